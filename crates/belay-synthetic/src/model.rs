//! What the disk must hold.

use std::collections::HashMap;

use crate::BLOCK;

/// What may be in each block. A block that was never written is zero.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// Versions of which one is there: only one, unless a write was given up that may or may not have happened.
    blocks: HashMap<u64, Vec<u64>>,
}

/// The version of a block that was never written.
const NEVER: u64 = 0;

impl Model {
    /// A write was acknowledged.
    pub(crate) fn written(&mut self, block: u64, version: u64) {
        self.blocks.insert(block, vec![version]);
    }

    /// A write was given up: it has happened, or it never will.
    pub(crate) fn given_up(&mut self, block: u64, version: u64) {
        self.blocks.entry(block).or_insert_with(|| vec![NEVER]).push(version);
    }

    /// A block was read. What it held of several possibilities, it holds from now on.
    pub(crate) fn read(&mut self, block: u64, bytes: &[u8]) {
        let present = self.check(block, bytes);
        if self.blocks.contains_key(&block) {
            self.blocks.insert(block, vec![present]);
        }
    }

    /// Which version this is; panics if it is none that may be there.
    pub(crate) fn check(&self, block: u64, bytes: &[u8]) -> u64 {
        let may_be = self.blocks.get(&block).map_or(&[NEVER][..], Vec::as_slice);
        let found = may_be.iter().find(|version| content(**version, block) == bytes);
        *found.unwrap_or_else(|| {
            let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            let uniform = bytes.chunks_exact(16).all(|chunk| chunk == &bytes[..16]);
            panic!(
                "block {block} holds version {} of block {}{}, want one of {may_be:?}",
                number(0),
                number(8),
                if uniform { "" } else { ", torn" }
            )
        })
    }

    /// Blocks that were ever written, in order.
    pub(crate) fn blocks(&self) -> Vec<u64> {
        let mut blocks: Vec<u64> = self.blocks.keys().copied().collect();
        blocks.sort_unstable();
        blocks
    }
}

/// A version of a block.
pub(crate) fn content(version: u64, block: u64) -> Vec<u8> {
    if version == NEVER {
        return vec![0; BLOCK];
    }
    let mut bytes = Vec::with_capacity(BLOCK);
    while bytes.len() < BLOCK {
        bytes.extend(version.to_le_bytes());
        bytes.extend(block.to_le_bytes());
    }
    bytes
}
