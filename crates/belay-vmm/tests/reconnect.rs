//! The command line against real QEMU and a real vhost-user backend (`qemu-storage-daemon`): the guest boots from
//! the disk, and survives a restart of the backend.

use belay_probe::boot;
use belay_vmm::{Accel, DiskPlug, Qemu, QemuCommand, Qmp, VmSpec, VmmProcess};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

const LIMIT: Duration = Duration::from_secs(60);
const OPERATIONS: usize = 40;

/// A backend that serves `image` on `socket`.
struct Backend(Child);

impl Backend {
    async fn start(image: &Path, socket: &Path) -> std::io::Result<Self> {
        let pid_file = socket.with_extension("pid");
        let _ = std::fs::remove_file(&pid_file);
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("driver=file,node-name=disk,filename={}", image.display())])
            .args(["--export", &format!(
                "type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
                socket.display()
            )])
            .args(["--pidfile", &pid_file.display().to_string()])
            .kill_on_drop(true)
            .spawn()?;
        // The pid file is written when the socket listens.
        until(|| pid_file.exists()).await;
        Ok(Self(child))
    }

    async fn kill(mut self) {
        self.0.kill().await.unwrap();
    }
}

/// Waits until something holds.
async fn until(holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("it happens in time");
}

/// Waits until the guest has done some more verified operations.
async fn progress(serial: &mut UnixStream) {
    let read = async {
        let (mut done, mut bytes) = (0, [0; 256]);
        while done < OPERATIONS {
            let len = serial.read(&mut bytes).await.unwrap();
            assert!(len > 0, "the VM ended");
            assert!(!bytes[..len].contains(&boot::OP_MISMATCH) && !bytes[..len].contains(&boot::OP_ERROR));
            done += bytes[..len].iter().filter(|byte| **byte == boot::OP_DONE).count();
        }
    };
    tokio::time::timeout(LIMIT, read).await.expect("the guest goes on");
}

struct Vm {
    process: VmmProcess,
    qmp: Qmp,
    serial: UnixStream,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
    }
}

/// Starts the VM of `spec` the way the agent does.
async fn start(qemu: &Qemu, dir: &Path, disk: &Path) -> Vm {
    let path = |name: &str| dir.join(name);
    let serial = path("serial");
    let mut spec = VmSpec::from_toml(&format!(
        "name='t'\nmemory_mib=64\naccel='tcg'\ndisks=[{{device='disk0',queues=2,boot_index=0}}]\n\
         args=['-chardev','socket,id=s,path={},server=on,wait=off','-serial','chardev:s']",
        serial.display()
    ))
    .unwrap();
    spec.resolve_machine(&qemu.machines().await.unwrap()).unwrap();
    let qmp_socket: PathBuf = path("qmp");
    let arguments = QemuCommand {
        spec: &spec,
        version: qemu.version,
        accel: Accel::Tcg,
        disks: &[DiskPlug { device: "disk0".into(), socket: disk.to_owned() }],
        qmp_socket: &qmp_socket,
        incoming: false,
        user: None,
    }
    .arguments()
    .unwrap();
    let process = VmmProcess::start(&qemu.path, &arguments, &path("log")).unwrap();
    let qmp = match Qmp::connect(&qmp_socket, LIMIT).await {
        Ok(qmp) => qmp,
        Err(error) => panic!("{error}: {}", belay_vmm::process::log_tail(&path("log"))),
    };
    let serial = UnixStream::connect(serial).await.unwrap();
    Vm { process, qmp, serial }
}

#[tokio::test]
async fn guest_survives_a_restart_of_its_backend() {
    let qemu = match Qemu::find(None).await {
        Ok(qemu) => qemu,
        Err(reason) => return belay_e2e::skip(reason),
    };
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("image"), dir.path().join("disk0"));
    std::fs::write(&image, boot::boot_sector()).unwrap();
    std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(4 << 20).unwrap();
    let backend = match Backend::start(&image, &socket).await {
        Ok(backend) => backend,
        Err(error) => {
            return belay_e2e::skip(format!("qemu-storage-daemon: {error}"));
        }
    };
    let mut vm = start(&qemu, dir.path(), &socket).await;
    progress(&mut vm.serial).await;
    // It dies with the guest's request in flight. It has no in-flight region; this guest has one request at a
    // time, which QEMU then gives to the next backend again.
    backend.kill().await;
    // What the guest wrote before must not count.
    let mut bytes = [0; 4096];
    while vm.serial.try_read(&mut bytes).is_ok() {}
    let _again = Backend::start(&image, &socket).await.unwrap();
    progress(&mut vm.serial).await;
    assert!(vm.qmp.query_status().await.unwrap().running);
    vm.process.terminate(LIMIT).await.unwrap();
}
