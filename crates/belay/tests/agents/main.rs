//! Two real agents and a VM in miniature that moves between them without QEMU: every request is checked.

mod fleet;
mod full;
mod links;
mod moves;
mod proxy;
mod queues;
mod random;
mod zombies;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use belay_e2e::{Bed, Host, until};
use belay_synthetic::Guest;
use serde_json::{Value, json};

const SIZE: u64 = 4 << 20;
const BLOCKS: u64 = SIZE / 4096;
const DEPTH: usize = 16;

fn with_bed(test: impl FnOnce(&mut Bed) -> Result<()>) {
    let mut bed = Bed::start(Path::new(env!("CARGO_BIN_EXE_belay"))).expect("two hosts");
    // The VM in miniature panics at what it does not like; the agents' logs say why it happened.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&mut bed)));
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => panic!("{error:#}\n{}", bed.logs()),
        Err(_) => panic!("the VM is not content\n{}", bed.logs()),
    }
}

/// Calls an agent's API: far cheaper than a command, and a test makes thousands.
fn call(host: &Path, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
    let mut stream = UnixStream::connect(host.join("agent.sock"))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: belay\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let ok = head.split(' ').nth(1).is_some_and(|status| status.starts_with('2'));
    ensure!(ok, "{method} {path}: {body}");
    Ok(if body.is_empty() { Value::Null } else { serde_json::from_str(body)? })
}

fn show(host: &Host) -> Result<Value> {
    show_named(host, "disk0")
}

fn show_named(host: &Host, name: &str) -> Result<Value> {
    call(&host.folder, "GET", &format!("/v1/devices/{name}"), None)
}

fn offer(folder: &Path, to: &str, mode: &str) -> Result<PathBuf> {
    offer_named(folder, "disk0", to, mode)
}

fn offer_named(folder: &Path, name: &str, to: &str, mode: &str) -> Result<PathBuf> {
    let body = json!({"to": to, "mode": mode});
    let offered = call(folder, "POST", &format!("/v1/devices/{name}/offer"), Some(&body))?;
    Ok(offered["socket"].as_str().context("no socket")?.into())
}

fn socket(host: &Host) -> PathBuf {
    socket_named(host, "disk0")
}

fn socket_named(host: &Host, name: &str) -> PathBuf {
    host.folder.join(format!("devices/{name}.sock"))
}

/// A disk of `host` that takes its time, and a VM on it.
fn boot(host: &Host, queues: u16, delay_us: u64, seed: u64) -> Result<Guest> {
    boot_named(host, "disk0", queues, delay_us, seed)
}

fn boot_named(host: &Host, name: &str, queues: u16, delay_us: u64, seed: u64) -> Result<Guest> {
    let image = host.folder.join(format!("{name}.img"));
    let body =
        json!({"name": name, "path": image, "size_bytes": SIZE, "queues": queues, "delay_us": delay_us});
    call(&host.folder, "POST", "/v1/devices", Some(&body))?;
    let mut guest = Guest::new(usize::from(queues), BLOCKS, seed);
    guest.connect(&socket_named(host, name));
    guest.fresh_inflight_region();
    guest.start();
    Ok(guest)
}

/// Does something that takes its time, while the guest goes on.
fn meanwhile<T: Send + 'static>(
    guest: &mut Guest,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let worker = std::thread::spawn(work);
    guest.run_until(DEPTH, |_| worker.is_finished());
    worker.join().map_err(|_| anyhow::anyhow!("the work panicked"))?
}

/// The guest goes on until the device of `host` is like this.
fn run_until(guest: &mut Guest, host: &Host, what: &str, mut like: impl FnMut(&Value) -> bool) -> Result<()> {
    until(what, || {
        guest.run(20, DEPTH);
        Ok(show(host).is_ok_and(|device| like(&device)).then_some(()))
    })
}

fn is_local(device: &Value) -> bool {
    device["state"] == "local" && device["exchange"].is_null()
}

/// What a VMM's migration is to the disk: the rings stop here, and start there.
fn switch_over(guest: &mut Guest, to: &Path) {
    guest.fill(DEPTH);
    guest.stop();
    guest.migrate_away();
    guest.connect(to);
    guest.fresh_inflight_region();
    guest.start();
}

fn hand_over(guest: &mut Guest, from: &Host, to: &Host, mode: &'static str) -> Result<()> {
    let (folder, name) = (from.folder.clone(), to.name);
    let socket = meanwhile(guest, move || offer(&folder, name, mode))?;
    switch_over(guest, &socket);
    until("the device at its new host", || {
        guest.run(20, DEPTH);
        let state = show(to)?["state"].clone();
        Ok((state == "remote" || state == "local").then_some(()))
    })
}

/// Brings the disk to `host`. Right after a handover the host's ledger does not know yet that the disk may come.
fn bring(folder: &Path) -> Result<()> {
    bring_named(folder, "disk0", None)
}

fn bring_named(folder: &Path, name: &str, bandwidth: Option<u64>) -> Result<()> {
    let body = json!({"bandwidth": bandwidth});
    until("an exchange that begins", || {
        match call(folder, "POST", &format!("/v1/devices/{name}/exchange"), Some(&body)) {
            Err(error) if error.to_string().contains("not backed by another host") => Ok(None),
            outcome => outcome.map(Some),
        }
    })
    .map(drop)
}

/// The agent of `host` was killed, and is back.
fn reconnect(guest: &mut Guest, host: &Host) {
    guest.lose_connection();
    guest.connect(&socket(host));
    guest.start();
}
