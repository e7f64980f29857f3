//! A guest in one sector: a real-mode program that does verified disk I/O for ever.
//!
//! SeaBIOS loads it from the first boot disk, within 200 ms under TCG. It writes and reads blocks of 4 KiB by
//! INT 13h (extended read 42h, extended write 43h), checks what it reads against what it wrote, and reports each
//! operation by one character on COM1:
//!
//! ```text
//! loop:  version += 1
//!        write pattern(version) to block (version mod 64)            → 'w'
//!        pick another block; if it was written before, read it,
//!        compare with pattern(version it was written with)           → '.', or 'M' on a mismatch
//!                                              INT 13h failed        → 'E'
//! ```
//!
//! If there is a second disk, blocks with an odd number are on it, at the same place.
//!
//! The pattern is 2,048 words, beginning with the version and growing by [`PATTERN_STEP`]; a stale, torn or
//! misplaced block differs in every word.

/// A block was read, and is right.
pub const OP_DONE: u8 = b'.';
/// A block was written.
pub const OP_WRITTEN: u8 = b'w';
/// The firmware reported an error.
pub const OP_ERROR: u8 = b'E';
/// A block did not hold what was written.
pub const OP_MISMATCH: u8 = b'M';

/// First sector of the region that the guest uses; 64 blocks of 8 sectors follow.
pub const REGION_SECTOR: u16 = 2048;
/// Blocks in the region; a power of two.
pub const REGION_BLOCKS: u16 = 64;

/// Difference between neighbouring words of a pattern; odd.
pub const PATTERN_STEP: u16 = 0x9e37;

/// Sectors per block.
const BLOCK_SECTORS: u8 = 8;
/// Words per block.
const BLOCK_WORDS: u16 = 2048;
/// Where the firmware loads the program.
const ORIGIN: u16 = 0x7c00;
/// Table of the version that each block holds, in the memory behind the program (one word each).
const TABLE: u16 = 0x7e00;
/// Version counter, one word.
const VERSION: u16 = 0x7f00;
/// Where the firmware says how many hard disks there are, one byte.
const DISKS: u16 = 0x475;
/// Boot drive, one byte.
const DRIVE: u16 = 0x7f02;
/// INT 13h's disk address packet, 16 bytes.
const PACKET: u16 = 0x7f10;
/// The data buffer, 4 KiB.
const BUFFER: u16 = 0x9000;

/// The boot sector: program and signature.
#[must_use]
pub fn boot_sector() -> [u8; 512] {
    let mut asm = Asm::default();
    start(&mut asm);
    main_loop(&mut asm);
    subroutines(&mut asm);
    asm.finish()
}

/// Segments, stack, tables.
fn start(asm: &mut Asm) {
    asm.bytes(&[0xfa]); //                        cli
    asm.bytes(&[0x31, 0xc0]); //                  xor ax, ax
    asm.bytes(&[0x8e, 0xd8]); //                  mov ds, ax
    asm.bytes(&[0x8e, 0xc0]); //                  mov es, ax
    asm.bytes(&[0x8e, 0xd0]); //                  mov ss, ax
    asm.op_word(&[0xbc], ORIGIN); //              mov sp, 7c00h
    asm.bytes(&[0xfb, 0xfc]); //                  sti; cld
    asm.op_word(&[0xbf], TABLE); //               mov di, TABLE
    asm.op_word(&[0xb9], (PACKET + 16 - TABLE) / 2); // mov cx, words up to the packet's end
    asm.bytes(&[0xf3, 0xab]); //                  rep stosw         ; all zero
    // Drive, version and packet lie in what was cleared.
    asm.op_word(&[0x88, 0x16], DRIVE); //         mov [DRIVE], dl
    asm.op_word(&[0xc7, 0x06], PACKET); //        mov word [PACKET], size 10h, reserved 0
    asm.word(0x0010);
    asm.op_word(&[0xc7, 0x06], PACKET + 2); //    mov word [PACKET+2], sectors
    asm.word(u16::from(BLOCK_SECTORS));
    asm.op_word(&[0xc7, 0x06], PACKET + 4); //    mov word [PACKET+4], buffer; its segment stays 0
    asm.word(BUFFER);
}

/// One write and one read per round.
fn main_loop(asm: &mut Asm) {
    asm.label("loop");
    asm.op_word(&[0xff, 0x06], VERSION); //       inc word [VERSION]
    asm.op_word(&[0xa1], VERSION); //             mov ax, [VERSION]
    asm.bytes(&[0x89, 0xc3]); //                  mov bx, ax
    asm.op_word(&[0xbf], BUFFER); //              mov di, BUFFER
    asm.op_word(&[0xb9], BLOCK_WORDS); //         mov cx, words
    asm.label("fill");
    asm.bytes(&[0xab]); //                        stosw
    asm.op_word(&[0x05], PATTERN_STEP); //        add ax, step
    asm.jump(&[0xe2], "fill"); //                 loop fill
    asm.bytes(&[0xb4, 0x43]); //                  mov ah, 43h       ; write
    asm.call("disk");
    asm.jump(&[0x72], "write_failed"); //         jc write_failed
    asm.op_word(&[0xa1], VERSION); //             mov ax, [VERSION]
    asm.bytes(&[0x89, 0x07]); //                  mov [bx], ax      ; bx = the block's place in the table
    asm.bytes(&[0xb0, OP_WRITTEN]); //            mov al, 'w'
    asm.call("print");

    // Another block: any odd factor reaches all of them.
    asm.op_word(&[0xa1], VERSION); //             mov ax, [VERSION]
    asm.op_word(&[0x69, 0xd8], 37); //            imul bx, ax, 37
    asm.bytes(&[0xb4, 0x42]); //                  mov ah, 42h       ; read
    asm.call("disk");
    asm.jump(&[0x72], "read_failed"); //          jc read_failed
    asm.bytes(&[0x8b, 0x07]); //                  mov ax, [bx]
    asm.bytes(&[0x85, 0xc0]); //                  test ax, ax
    asm.jump(&[0x74], "right"); //                jz right          ; never written: anything is right
    asm.op_word(&[0xbf], BUFFER); //              mov di, BUFFER
    asm.op_word(&[0xb9], BLOCK_WORDS); //         mov cx, words
    asm.label("compare");
    asm.bytes(&[0xaf]); //                        scasw
    asm.jump(&[0x75], "wrong"); //                jne wrong
    asm.op_word(&[0x05], PATTERN_STEP); //        add ax, step
    asm.jump(&[0xe2], "compare"); //              loop compare
    asm.label("right");
    asm.bytes(&[0xb0, OP_DONE]); //               mov al, '.'
    asm.jump(&[0xeb], "report"); //               jmp report
    asm.label("wrong");
    asm.bytes(&[0xb0, OP_MISMATCH]); //           mov al, 'M'
    asm.jump(&[0xeb], "report"); //               jmp report
    asm.label("write_failed");
    // Old or new content: nobody knows, so the next read of it is not compared.
    asm.bytes(&[0xc7, 0x07, 0, 0]); //            mov word [bx], 0
    asm.label("read_failed");
    asm.bytes(&[0xb0, OP_ERROR]); //              mov al, 'E'
    asm.label("report");
    asm.call("print");
    asm.jump(&[0xeb], "loop"); //                 jmp loop
}

fn subroutines(asm: &mut Asm) {
    // disk: ah = 42h or 43h, bx = block number (any). Returns carry, and bx = address of the block's table entry.
    asm.label("disk");
    asm.op_word(&[0x81, 0xe3], REGION_BLOCKS - 1); // and bx, 63
    asm.bytes(&[0x89, 0xdf]); //                  mov di, bx
    asm.bytes(&[0xc1, 0xe7, 3]); //               shl di, 3         ; sectors
    asm.op_word(&[0x81, 0xc7], REGION_SECTOR); // add di, first sector
    asm.op_word(&[0x89, 0x3e], PACKET + 8); //    mov [PACKET+8], di ; the upper six bytes stay 0
    asm.bytes(&[0xd1, 0xe3]); //                  shl bx, 1
    asm.op_word(&[0x81, 0xc3], TABLE); //         add bx, TABLE
    asm.bytes(&[0x53]); //                        push bx
    asm.op_word(&[0x8a, 0x16], DRIVE); //         mov dl, [DRIVE]
    asm.op_word(&[0x80, 0x3e], DISKS); //         cmp byte [DISKS], 2
    asm.bytes(&[2]);
    asm.jump(&[0x72], "this_drive"); //           jb this_drive
    asm.bytes(&[0xf6, 0xc3, 2]); //               test bl, 2        ; the block's lowest bit
    asm.jump(&[0x74], "this_drive"); //           jz this_drive
    asm.bytes(&[0xfe, 0xc2]); //                  inc dl
    asm.label("this_drive");
    asm.op_word(&[0xbe], PACKET); //              mov si, PACKET
    asm.bytes(&[0xb0, 0x00]); //                  mov al, 0         ; write without verify
    asm.bytes(&[0xcd, 0x13]); //                  int 13h
    asm.bytes(&[0x5b]); //                        pop bx            ; leaves carry alone
    asm.bytes(&[0xc3]); //                        ret

    // print: al = character.
    asm.label("print");
    asm.bytes(&[0x88, 0xc4]); //                  mov ah, al
    asm.op_word(&[0xba], 0x3fd); //               mov dx, 3fdh      ; line status
    asm.label("wait");
    asm.bytes(&[0xec]); //                        in al, dx
    asm.bytes(&[0xa8, 0x20]); //                  test al, 20h      ; transmitter empty
    asm.jump(&[0x74], "wait"); //                 jz wait
    asm.op_word(&[0xba], 0x3f8); //               mov dx, 3f8h      ; data
    asm.bytes(&[0x88, 0xe0]); //                  mov al, ah
    asm.bytes(&[0xee]); //                        out dx, al
    asm.bytes(&[0xc3]); //                        ret
}

/// Collects bytes, remembers labels, fills in jumps at the end.
#[derive(Default)]
struct Asm {
    code: Vec<u8>,
    labels: Vec<(&'static str, usize)>,
    fixups: Vec<Fixup>,
}

/// A displacement to be filled in, counted from the byte behind it.
struct Fixup {
    at: usize,
    width: usize,
    label: &'static str,
}

impl Asm {
    fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn word(&mut self, word: u16) {
        self.bytes(&word.to_le_bytes());
    }

    fn op_word(&mut self, op: &[u8], word: u16) {
        self.bytes(op);
        self.word(word);
    }

    fn label(&mut self, name: &'static str) {
        self.labels.push((name, self.code.len()));
    }

    /// An instruction with an 8-bit displacement.
    fn jump(&mut self, op: &[u8], label: &'static str) {
        self.bytes(op);
        self.fixups.push(Fixup { at: self.code.len(), width: 1, label });
        self.bytes(&[0]);
    }

    /// `call` with its 16-bit displacement.
    fn call(&mut self, label: &'static str) {
        self.bytes(&[0xe8]);
        self.fixups.push(Fixup { at: self.code.len(), width: 2, label });
        self.word(0);
    }

    /// The sector. The program is fixed, so that a wrong label or a jump too far is found by any test.
    fn finish(mut self) -> [u8; 512] {
        for Fixup { at, width, label } in &self.fixups {
            let target = self.labels.iter().find(|(name, _)| name == label).map(|(_, place)| *place);
            let target = target.unwrap_or_else(|| unreachable!("no label {label}"));
            let distance = target as i32 - (at + width) as i32;
            assert!(*width == 2 || i8::try_from(distance).is_ok(), "jump to {label} is too far: {distance}");
            self.code[*at..at + width].copy_from_slice(&distance.to_le_bytes()[..*width]);
        }
        assert!(self.code.len() <= 440, "the program is too long: {} bytes", self.code.len());
        let mut sector = [0; 512];
        sector[..self.code.len()].copy_from_slice(&self.code);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        sector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sector_starts_with_code_and_ends_with_the_signature() {
        let sector = boot_sector();
        assert_eq!(sector[0], 0xfa);
        assert_eq!(sector[510..], [0x55, 0xaa]);
        assert!(sector.iter().filter(|byte| **byte != 0).count() > 100);
    }
}
