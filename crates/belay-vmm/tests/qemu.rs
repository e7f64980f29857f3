//! The driver against the QEMU of this host: boots, QMP, migration, processes.

use belay_vmm::spec::AccelChoice;
use belay_vmm::{Accel, Capability, MachineInfo, Phase, Qemu, Qmp, QmpError, Side, Tracker, VmmProcess};
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// The QEMU to test with, or the printed reason why the test is skipped.
async fn qemu() -> Option<Qemu> {
    match Qemu::find(None).await {
        Ok(qemu) => Some(qemu),
        Err(reason) => {
            belay_e2e::skip(reason);
            None
        }
    }
}

/// A VM without disks, waiting for commands.
struct Vm {
    process: VmmProcess,
    qmp: Qmp,
}

impl Vm {
    async fn start(qemu: &Qemu, dir: &Path, name: &str, incoming: bool) -> Self {
        let socket = dir.join(format!("{name}.qmp"));
        let mut arguments: Vec<String> = format!(
            "-accel tcg -machine pc,memory-backend=mem0 -m 32M -object memory-backend-memfd,id=mem0,share=on,size=32M \
             -nodefaults -no-user-config -display none -qmp unix:{},server=on,wait=off",
            socket.display()
        )
        .split_ascii_whitespace()
        .map(str::to_owned)
        .collect();
        if incoming {
            arguments.extend(["-incoming", "defer"].map(str::to_owned));
        }
        let process = VmmProcess::start(&qemu.path, &arguments, &dir.join(format!("{name}.log"))).unwrap();
        let qmp = Qmp::connect(&socket, LIMIT).await.unwrap();
        Self { process, qmp }
    }

    async fn end(self) {
        self.process.terminate(LIMIT).await.unwrap();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
    }
}

/// Follows one end of a migration until its last phase. Listens from the call on, not from the first poll.
fn follow(
    qmp: &Qmp,
    mut tracker: Tracker,
    mut on_phase: impl AsyncFnMut(&Phase),
) -> impl Future<Output = Phase> {
    let mut events = qmp.events();
    async move {
        let followed = async {
            while !tracker.phase().is_final() {
                let event = events.recv().await.unwrap();
                if let Some(phase) = tracker.on_event(&event) {
                    on_phase(phase).await;
                }
                if tracker.wants_reason() {
                    tracker.on_query(&qmp.query_migrate().await.unwrap());
                }
            }
        };
        tokio::time::timeout(LIMIT, followed).await.expect("the migration ends");
        tracker.phase().clone()
    }
}

#[tokio::test]
async fn machines_by_help_and_by_qmp_agree() {
    let Some(qemu) = qemu().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::start(&qemu, dir.path(), "a", false).await;
    let find =
        |machines: &[MachineInfo]| machines.iter().find(|m| m.alias.as_deref() == Some("q35")).cloned();
    let by_help = find(&qemu.machines().await.unwrap());
    assert!(by_help.is_some());
    assert_eq!(find(&vm.qmp.query_machines().await.unwrap()), by_help);
    assert_eq!(vm.qmp.version(), qemu.version);
    vm.end().await;
}

#[tokio::test]
async fn commands_fail_with_class_and_the_connection_lives_on() {
    let Some(qemu) = qemu().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::start(&qemu, dir.path(), "a", false).await;
    let error = vm.qmp.execute("no-such-thing", serde_json::json!({})).await.unwrap_err();
    assert!(error.is_unknown_command(), "{error}");
    let error = vm.qmp.migrate("nonsense:").await.unwrap_err();
    assert!(matches!(&error, QmpError::Command { class, .. } if class == "GenericError"), "{error}");
    let mut events = vm.qmp.events();
    vm.qmp.stop().await.unwrap();
    assert_eq!(events.recv().await.unwrap().name, "STOP");
    assert!(!vm.qmp.query_status().await.unwrap().running);
    vm.qmp.cont().await.unwrap();
    assert!(vm.qmp.query_status().await.unwrap().running);
    vm.qmp.quit().await.unwrap();
    vm.qmp.closed().await;
    assert!(matches!(vm.qmp.query_status().await, Err(QmpError::Closed(_))));
    vm.process.exited().await.unwrap();
    assert!(!vm.process.is_alive());
}

#[tokio::test]
async fn migration_goes_through_its_phases() {
    let Some(qemu) = qemu().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let source = Vm::start(&qemu, dir.path(), "a", false).await;
    let destination = Vm::start(&qemu, dir.path(), "b", true).await;
    let both = [(Capability::Events, true), (Capability::ReturnPath, true)];
    destination.qmp.set_capabilities(&both).await.unwrap();
    source.qmp.set_capabilities(&both).await.unwrap();
    source.qmp.set_capabilities(&[(Capability::PauseBeforeSwitchover, true)]).await.unwrap();
    source.qmp.set_migration_limits(Some(1 << 30), Some(Duration::from_millis(300))).await.unwrap();
    let uri = format!("unix:{}", dir.path().join("m").display());
    destination.qmp.migrate_incoming(&uri).await.unwrap();

    let mut seen = Vec::new();
    let at_source = follow(&source.qmp, Tracker::new(Side::Source), async |phase: &Phase| {
        if *phase == Phase::PreSwitchover {
            source.qmp.migrate_continue().await.unwrap();
        }
        seen.push(phase.clone());
    });
    let mut seen_there = Vec::new();
    let at_destination = follow(&destination.qmp, Tracker::new(Side::Destination), async |phase: &Phase| {
        seen_there.push(phase.clone());
    });
    let started = source.qmp.migrate(&uri);
    let (a, b, started) = tokio::join!(at_source, at_destination, started);
    started.unwrap();
    assert_eq!((a, b), (Phase::Completed, Phase::Completed));
    assert!(matches!(seen.first(), Some(Phase::Active { .. })), "{seen:?}");
    assert_eq!(seen[1..], [Phase::SourceStopped, Phase::PreSwitchover, Phase::Completed]);
    assert!(seen_there.ends_with(&[Phase::Resumed, Phase::Completed]), "{seen_there:?}");
    let info = source.qmp.query_migrate().await.unwrap();
    assert_eq!(info.status.as_deref(), Some("completed"));
    assert!(info.ram.unwrap().total >= 32 << 20 && info.downtime.is_some() && info.total_time.is_some());
    assert!(destination.qmp.query_status().await.unwrap().running);
    source.end().await;
    destination.end().await;
}

#[tokio::test]
async fn cancel_in_pre_switchover_gives_the_guest_back() {
    let Some(qemu) = qemu().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let source = Vm::start(&qemu, dir.path(), "a", false).await;
    let destination = Vm::start(&qemu, dir.path(), "b", true).await;
    let capabilities = [(Capability::Events, true), (Capability::PauseBeforeSwitchover, true)];
    source.qmp.set_capabilities(&capabilities).await.unwrap();
    let uri = format!("unix:{}", dir.path().join("m").display());
    destination.qmp.migrate_incoming(&uri).await.unwrap();
    let followed = follow(&source.qmp, Tracker::new(Side::Source), async |phase: &Phase| {
        if *phase == Phase::PreSwitchover {
            source.qmp.migrate_cancel().await.unwrap();
        }
    });
    let (last, started) = tokio::join!(followed, source.qmp.migrate(&uri));
    started.unwrap();
    assert_eq!(last, Phase::Cancelled);
    // QEMU resumes the guest just after it reports the end.
    let running = async { while !source.qmp.query_status().await.unwrap().running {} };
    tokio::time::timeout(LIMIT, running).await.unwrap();
    source.end().await;
    destination.end().await;
}

#[tokio::test]
async fn migration_to_nowhere_fails_with_a_reason() {
    let Some(qemu) = qemu().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let source = Vm::start(&qemu, dir.path(), "a", false).await;
    source.qmp.set_capabilities(&[(Capability::Events, true)]).await.unwrap();
    let uri = format!("unix:{}", dir.path().join("nobody").display());
    let qmp = source.qmp.clone();
    let followed = follow(&qmp, Tracker::new(Side::Source), async |_: &Phase| {});
    let started = source.qmp.migrate(&uri).await;
    // Newer QEMUs refuse the command itself, older ones report a failed migration.
    if started.is_ok() {
        let Phase::Failed { reason } = followed.await else { panic!("did not fail") };
        assert!(!reason.is_empty());
    }
    assert!(source.qmp.query_status().await.unwrap().running);
    source.end().await;
}

#[tokio::test]
async fn vmm_is_found_again_by_identity_only() {
    let Some(qemu) = qemu().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::start(&qemu, dir.path(), "a", false).await;
    let id = vm.process.id();
    let session = rustix::process::getsid(rustix::process::Pid::from_raw(id.pid as i32)).unwrap();
    assert_eq!(session.as_raw_nonzero().get() as u32, id.pid, "a session of its own");
    let again = VmmProcess::find(id).unwrap();
    assert!(again.is_alive());
    let mut other = id;
    other.start_ticks += 1;
    assert!(VmmProcess::find(other).is_err());
    drop(again);
    assert!(vm.process.is_alive(), "dropping the handle does no harm");
    vm.process.terminate(LIMIT).await.unwrap();
    assert!(VmmProcess::find(id).is_err());
}

#[tokio::test]
async fn wrong_argument_is_told_by_the_log() {
    let Some(qemu) = qemu().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let process = VmmProcess::start(&qemu.path, &["-nonsense".into()], &log).unwrap();
    tokio::time::timeout(LIMIT, process.exited()).await.unwrap().unwrap();
    let tail = belay_vmm::process::log_tail(&log);
    assert!(tail.contains("nonsense"), "{tail}");
}

#[tokio::test]
async fn boot_sector_guest_does_verified_io() {
    let Some(qemu) = qemu().await else { return };
    qemu.try_boot_sector(Accel::Tcg).await.unwrap();
}

#[tokio::test]
async fn accelerator_is_chosen_by_trial() {
    let Some(qemu) = qemu().await else { return };
    // A kernel that cannot boot must make the trial fail, whatever /dev/kvm is.
    let tried = qemu.try_kvm(Some(Path::new("/dev/null"))).await;
    assert!(tried.is_err());
    assert_eq!(Accel::choose(AccelChoice::Auto, tried.clone()).unwrap(), Accel::Tcg);
    assert!(Accel::choose(AccelChoice::Kvm, tried).is_err());
    assert_eq!(Accel::choose(AccelChoice::Tcg, Ok(())).unwrap(), Accel::Tcg);
}
