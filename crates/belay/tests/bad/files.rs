//! Files that cannot be disks.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use belay_e2e::{Host, until};

use super::{fails_with, with_bed, work_together};

fn image(host: &Host, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = host.images.join(name);
    File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

fn add(host: &Host, name: &str, path: &str, code: i32, words: &[&str]) -> Result<()> {
    let words = [&["device ", name], words].concat();
    fails_with(host, code, &["device", "add", name, "--path", path], &words)
}

#[test]
fn file_that_cannot_be_a_disk_is_refused_with_what_to_do() {
    with_bed(|bed| {
        let a = &bed.a;
        let path = |name: &str| a.images.join(name).display().to_string();
        add(a, "missing", &path("missing.img"), 1, &["does not exist", "--size"])?;
        image(a, "empty.img", 0)?;
        add(a, "empty", &path("empty.img"), 1, &["empty.img has 0 bytes", "--size"])?;
        image(a, "small.img", 100)?;
        add(a, "small", &path("small.img"), 1, &["small.img has 100 bytes", "truncate"])?;
        image(a, "odd.img", 5000)?;
        add(a, "odd", &path("odd.img"), 1, &["odd.img has 5000 bytes", "multiple of 512", "truncate"])?;
        add(a, "folder", &a.images.display().to_string(), 1, &["neither a regular file", "give the path"])?;
        add(a, "none", "/dev/null", 1, &["neither a regular file"])?;
        // Locked by somebody else, as agents lock it.
        let locked = image(a, "locked.img", 1 << 20)?;
        let holder = File::options().read(true).write(true).open(&locked)?;
        rustix::fs::fcntl_lock(&holder, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        add(a, "locked", &path("locked.img"), 1, &["is in use", "fuser -v"])?;
        drop(holder);
        a.belay(&["device", "add", "locked", "--path", &path("locked.img")])?;
        add(a, "again", &path("locked.img"), 3, &["is device locked already"])?;
        ensure!(a.json(&["device", "list"])?.as_array().is_some_and(|devices| devices.len() == 1));
        // The same once more is no mistake, but another under the name is.
        a.belay(&["device", "add", "locked", "--path", &path("locked.img")])?;
        image(a, "other.img", 1 << 20)?;
        add(a, "locked", &path("other.img"), 2, &["already", "choose another name"])?;
        fails_with(a, 3, &["device", "resize", "locked", "512K"], &["device locked", "not smaller"])?;
        fails_with(a, 2, &["device", "resize", "locked", "1048577"], &["multiple of 512"])?;
        a.belay(&["device", "resize", "locked", "1M"])?;
        work_together(bed)
    });
}

#[test]
fn file_that_may_not_be_written_is_a_disk_only_if_it_is_read_only() {
    if rustix::process::geteuid().is_root() {
        belay_e2e::skip("root may write to everything");
        return;
    }
    with_bed(|bed| {
        let path = image(&bed.a, "ro.img", 1 << 20)?;
        let mut permissions = std::fs::metadata(&path)?.permissions();
        permissions.set_readonly(true);
        std::fs::set_permissions(&path, permissions)?;
        let path = path.display().to_string();
        add(&bed.a, "ro", &path, 1, &["ro.img may not be opened", "owner or mode"])?;
        bed.a.belay(&["device", "add", "ro", "--path", &path, "--read-only"]).map(drop)
    });
}

/// The device's state and what is wrong with it.
fn state(host: &Host, name: &str) -> Result<(String, String)> {
    let device = host.device(name)?;
    let text = |key: &str| device[key].as_str().unwrap_or_default().to_owned();
    Ok((text("state"), text("trouble")))
}

#[test]
fn device_whose_file_is_gone_or_shrunk_or_locked_fails_alone_and_says_why() {
    with_bed(|bed| {
        for name in ["gone", "shrunk", "grown", "locked", "well"] {
            let path = image(&bed.a, name, 1 << 20)?;
            File::options().write(true).open(&path)?.write_all(b"content")?;
            bed.a.belay(&["device", "add", name, "--path", &path.display().to_string()])?;
        }
        bed.a.terminate_agent()?;
        let images = bed.a.images.clone();
        let path = |name: &str| images.join(name);
        std::fs::remove_file(path("gone"))?;
        File::options().write(true).open(path("shrunk"))?.set_len(1 << 19)?;
        File::options().write(true).open(path("grown"))?.set_len(1 << 21)?;
        let holder = File::options().read(true).write(true).open(path("locked"))?;
        rustix::fs::fcntl_lock(&holder, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        bed.a.start_agent()?;
        ensure!(state(&bed.a, "well")?.0 == "local");
        ensure!(state(&bed.a, "grown")?.0 == "local");
        let (gone, shrunk) = (state(&bed.a, "gone")?, state(&bed.a, "shrunk")?);
        ensure!(gone.0 == "failed" && gone.1.contains("does not exist"), "{gone:?}");
        ensure!(
            shrunk.0 == "failed" && shrunk.1.contains("has 524288 bytes, the device 1048576"),
            "{shrunk:?}"
        );
        let said = bed.a.belay(&["device", "list"])?;
        ensure!(said.lines().any(|line| line.starts_with("gone") && line.contains("failed")), "{said}");
        let trouble = ["cannot be served", "restart the agent"];
        fails_with(&bed.a, 3, &["device", "offer", "gone", bed.b.name], &trouble)?;
        fails_with(&bed.a, 3, &["device", "resize", "shrunk", "4M"], &trouble)?;
        let vm = bed.a.folder.join("vm.toml");
        std::fs::write(&vm, "name = \"vm\"\naccel = \"tcg\"\ndisks = [{ device = \"shrunk\" }]\n")?;
        if belay_e2e::no_qemu().is_none() {
            fails_with(&bed.a, 3, &["vm", "run", &vm.display().to_string()], &trouble)?;
        }
        // One that is only locked comes by itself.
        until("the trouble being told", || Ok((state(&bed.a, "locked")?.0 == "failed").then_some(())))?;
        ensure!(state(&bed.a, "locked")?.1.contains("another process holds a lock"));
        drop(holder);
        until(
            "the locked device being served",
            || Ok((state(&bed.a, "locked")?.0 == "local").then_some(())),
        )?;
        // The others, once they are mended.
        std::fs::write(path("gone"), vec![0; 1 << 20])?;
        bed.a.belay(&["device", "remove", "shrunk"])?;
        bed.a.terminate_agent()?;
        bed.a.start_agent()?;
        ensure!(state(&bed.a, "gone")?.0 == "local");
        work_together(bed)
    });
}
