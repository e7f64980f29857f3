//! The VM leaves first, its disk follows.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::{COPY_BYTES_PER_S, Moved, PATIENCE, Scene, VM, observed};
use crate::console::Console;
use crate::hosts::Hosts;
use crate::limit::go_on;
use crate::network::Network;

const DISK: &str = "disk0";

pub(super) fn evacuate(scene: &Scene, console: &Console) -> Result<Value> {
    let hosts = Hosts::start(
        &scene.belay,
        &scene.sockets,
        &scene.images,
        Network::loopback()?,
        COPY_BYTES_PER_S,
        VM,
        &scene.guest,
    )?;
    let [a, b] = &hosts.all;
    a.local(&[
        "device",
        "add",
        DISK,
        "--path",
        &scene.disk.display().to_string(),
        "--queues",
        "1",
        "--vm",
        VM,
    ])?;
    let spec = scene.sockets.join("vm.toml");
    std::fs::write(&spec, specification(scene))?;
    a.local(&["vm", "run", &spec.display().to_string()])?;
    console.attach(&a.console(), Duration::from_secs(20))?;
    observed(console, || {
        let began = Instant::now();
        let operation =
            a.json(&["migrate", VM, b.name, "--no-wait", "--bandwidth", &COPY_BYTES_PER_S.to_string()])?;
        let id = operation["id"].as_str().unwrap_or_default().to_owned();
        console.attach(&b.console(), Duration::from_secs(30))?;
        let operation = loop {
            go_on("the migration")?;
            let view = a.json(&["operation", &id])?;
            match view["state"].as_str() {
                Some("running") => std::thread::sleep(Duration::from_millis(10)),
                Some("done") => break view,
                _ => bail!("the migration failed: {}", view["error"]),
            }
        };
        let vm_left = began.elapsed();
        while b.json(&["device", "show", DISK])?["state"] != "local" {
            go_on("the disk")?;
            ensure!(began.elapsed() < PATIENCE, "the disk has not followed");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Moved {
            vm_left,
            host_empty: began.elapsed(),
            downtime_ms: operation["report"]["migration"]["downtime_ms"].as_u64().unwrap_or(0),
        })
    })
}

fn specification(scene: &Scene) -> String {
    let path = |name: &str| scene.guest.join(name).display().to_string();
    format!(
        "name = {VM:?}\nmemory_mib = 256\ncpus = 1\naccel = \"tcg\"\nkernel = {:?}\ninitrd = {:?}\nappend = {:?}\n\
         disks = [{{ device = {DISK:?} }}]\n\
         args = [\"-chardev\", \"socket,id=console,path={{runtime_dir}}/{VM}.console,server=on,wait=off\", \"-serial\", \"chardev:console\", \"-no-reboot\"]\n",
        path("vmlinuz"),
        path("initrd.img"),
        scene.append(),
    )
}
