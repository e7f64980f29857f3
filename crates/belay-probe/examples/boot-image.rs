//! Writes a disk image whose first sector is the boot-sector guest: `boot-image PATH SIZE_MIB`.

use std::io::Write;

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, path, size_mib] = &arguments[..] else {
        eprintln!("usage: boot-image PATH SIZE_MIB");
        std::process::exit(2);
    };
    let mut file = std::fs::File::create(path)?;
    file.write_all(&belay_probe::boot_sector())?;
    file.set_len(size_mib.parse::<u64>().map_err(std::io::Error::other)? << 20)
}
