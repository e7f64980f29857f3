//! The guest's memory: the regions that the VMM shares with us.

/// The regions of one memory table, mapped. Immutable: a changed table is a new value, and whoever still holds the
/// old one keeps its mappings.
pub struct GuestMemory {
    regions: Vec<()>,
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMemory").field("regions", &self.regions.len()).finish()
    }
}
