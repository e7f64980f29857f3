//! VMM driver: QMP, VM specifications, QEMU command lines and processes.
//!
//! What Belay needs of a VMM, and nothing else: start it with its disks on Belay's sockets, recognise it after the
//! agent was restarted, drive its live migration, and tell where that migration stands.
//!
//! | module | what it is |
//! |---|---|
//! | [`qmp`] | the QMP connection: commands, replies, events |
//! | [`migrate`] | typed commands of a migration, and [`migrate::Tracker`], which turns events into phases (no I/O) |
//! | [`spec`] | the VM's specification, a TOML file |
//! | [`command`] | specification + sockets → QEMU's arguments (no I/O) |
//! | [`adopt`] | a QEMU that runs already → how to start it at another host (no I/O) |
//! | [`policy`] | which arguments another host may choose for a VM that it sends here (no I/O) |
//! | [`process`] | QEMU as a process that outlives the agent |
//! | [`detect`] | which QEMU is here, what it can do, and whether KVM works |

pub mod adopt;
pub mod command;
pub mod detect;
pub mod migrate;
pub mod policy;
pub mod process;
pub mod qmp;
pub mod spec;

pub use command::{CommandError, DiskPlug, QemuCommand};
pub use detect::{Accel, DetectError, Qemu, QemuVersion};
pub use migrate::{Capability, MachineInfo, MigrationInfo, Phase, RamProgress, RunState, Side, Tracker};
pub use policy::{Forbidden, Policy};
pub use process::{ProcessError, ProcessId, VmmProcess};
pub use qmp::{Event, Qmp, QmpError};
pub use spec::{AccelChoice, DiskSpec, PciAddr, SpecError, VmSpec};
