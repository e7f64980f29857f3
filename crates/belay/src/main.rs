//! The belay command
fn main() {}
