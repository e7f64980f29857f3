//! The disk is copied first, then the VM leaves: QEMU alone, driven as libvirt drives it.
//!
//! The destination exports an empty disk over NBD; the source mirrors its own there, guest writes included; when the
//! copy is complete the memory migrates, and at the switchover the mirror ends.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use belay_vmm::{Capability, Qmp};
use serde_json::{Value, json};

use super::{COPY_BYTES_PER_S, DISK_BYTES, Moved, PATIENCE, Scene, observed};
use crate::console::Console;
use crate::limit::go_on;

/// How long QEMU may take for any one answer.
const ANSWER: Duration = Duration::from_secs(20);

/// A QEMU with an own disk; it ends with its owner.
struct Vm {
    process: Child,
    qmp: PathBuf,
    console: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Vm {
    fn start(scene: &Scene, name: &str, disk: &std::path::Path, incoming: bool) -> Result<Self> {
        let file = |suffix: &str| scene.sockets.join(format!("{name}.{suffix}"));
        let (qmp, console) = (file("qmp"), file("console"));
        let log = std::fs::File::create(file("log"))?;
        let mut command = Command::new(qemu());
        let mut add = |name: &str, value: String| {
            command.args([name, value.as_str()]);
        };
        add("-machine", "q35,memory-backend=mem0".into());
        add("-accel", "tcg".into());
        add("-m", "256M".into());
        add("-smp", "1".into());
        add("-object", "memory-backend-memfd,id=mem0,share=on,size=256M".into());
        add("-display", "none".into());
        add("-qmp", format!("unix:{},server=on,wait=off", qmp.display()));
        add(
            "-blockdev",
            format!(
                "driver=file,node-name=file0,filename={},cache.direct=on,aio=io_uring,discard=unmap",
                disk.display()
            ),
        );
        add(
            "-blockdev",
            "driver=raw,node-name=disk0,file=file0,cache.direct=on,discard=unmap,detect-zeroes=unmap".into(),
        );
        add("-object", "iothread,id=io0".into());
        add("-device", "virtio-blk-pci,drive=disk0,iothread=io0,id=disk".into());
        add("-chardev", format!("socket,id=console,path={},server=on,wait=off", console.display()));
        add("-serial", "chardev:console".into());
        add("-kernel", scene.guest.join("vmlinuz").display().to_string());
        add("-initrd", scene.guest.join("initrd.img").display().to_string());
        add("-append", scene.append());
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let process = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start QEMU")?;
        Ok(Self { process, qmp, console })
    }

    async fn qmp(&self) -> Result<Qmp> {
        Ok(Qmp::connect(&self.qmp, ANSWER).await?)
    }
}

fn qemu() -> String {
    std::env::var("BELAY_QEMU")
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "qemu-system-x86_64".into())
}

pub(super) fn evacuate(scene: &Scene, console: &Console) -> Result<Value> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let source = Vm::start(scene, "source", &scene.disk, false)?;
    console.attach(&source.console, ANSWER)?;
    let mut target = None;
    let figures = observed(console, || {
        let began = Instant::now();
        let disk = scene.images.join("destination.img");
        std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
        let target = target.insert(Vm::start(scene, "target", &disk, true)?);
        console.attach(&target.console, ANSWER)?;
        runtime.block_on(leave(&source, target, scene, began))
    })?;
    Ok(figures)
}

async fn leave(source: &Vm, target: &Vm, scene: &Scene, began: Instant) -> Result<Moved> {
    let (here, there) = (source.qmp().await?, target.qmp().await?);
    let nbd = scene.sockets.join("nbd.sock").display().to_string();
    there.execute("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": nbd } } })).await?;
    let export =
        json!({ "type": "nbd", "id": "disk0", "node-name": "disk0", "name": "disk0", "writable": true });
    there.execute("block-export-add", export).await?;
    let remote = json!({
        "driver": "raw", "node-name": "remote0", "discard": "unmap",
        "file": { "driver": "nbd", "export": "disk0", "server": { "type": "unix", "path": nbd } },
    });
    here.execute("blockdev-add", remote).await?;
    let mirror = json!({
        "job-id": "mirror", "device": "disk0", "target": "remote0", "sync": "full",
        "copy-mode": "write-blocking", "speed": COPY_BYTES_PER_S, "auto-dismiss": false,
    });
    here.execute("blockdev-mirror", mirror).await?;
    until_job(&here, "ready", began).await?;
    let downtime_ms = migrate(&here, &there, scene, began).await?;
    let vm_left = began.elapsed();
    // Nothing of the VM is at the source any more.
    here.quit().await?;
    Ok(Moved { vm_left, host_empty: began.elapsed(), downtime_ms })
}

async fn until_job(qmp: &Qmp, wanted: &str, began: Instant) -> Result<()> {
    loop {
        go_on("the mirror")?;
        let jobs = qmp.execute("query-jobs", json!({})).await?;
        let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == "mirror").cloned());
        let job = job.context("the mirror is gone")?;
        ensure!(job["error"].is_null(), "the mirror failed: {}", job["error"]);
        if job["status"] == wanted {
            return Ok(());
        }
        ensure!(began.elapsed() < PATIENCE, "the mirror is not {wanted} in time");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Memory, with the mirror ended while the VM stands still. Returns QEMU's downtime.
async fn migrate(here: &Qmp, there: &Qmp, scene: &Scene, began: Instant) -> Result<u64> {
    let uri = format!("unix:{}", scene.sockets.join("migration.sock").display());
    let common = [(Capability::Events, true), (Capability::ReturnPath, true)];
    there.set_capabilities(&common).await?;
    here.set_capabilities(&[common[0], common[1], (Capability::PauseBeforeSwitchover, true)]).await?;
    here.set_migration_limits(Some(COPY_BYTES_PER_S), None).await?;
    there.migrate_incoming(&uri).await?;
    here.migrate(&uri).await?;
    loop {
        go_on("the migration")?;
        let info = here.query_migrate().await?;
        match info.status.as_deref().unwrap_or_default() {
            "pre-switchover" => {
                here.execute("block-job-cancel", json!({ "device": "mirror", "force": false })).await?;
                until_job(here, "concluded", began).await?;
                here.execute("job-dismiss", json!({ "id": "mirror" })).await?;
                here.execute("blockdev-del", json!({ "node-name": "remote0" })).await?;
                there.execute("nbd-server-stop", json!({})).await?;
                here.migrate_continue().await?;
            }
            "completed" => break,
            "failed" | "cancelled" => bail!("QEMU's migration failed: {:?}", info.error_desc),
            _ => {}
        }
        ensure!(began.elapsed() < PATIENCE, "the memory did not arrive in time");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    while !there.query_status().await?.running {
        ensure!(began.elapsed() < PATIENCE, "the VM does not run at the destination");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(here.query_migrate().await?.downtime.unwrap_or(0))
}
