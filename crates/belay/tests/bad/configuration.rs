//! Configurations that cannot be used.

use anyhow::{Context, Result, ensure};

/// What an agent with this configuration says before it ends.
fn agent(text: &str) -> Result<(Option<i32>, String)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("agent.toml");
    let text = text.replace("{folder}", &folder.path().display().to_string());
    std::fs::write(&path, text)?;
    std::fs::write(folder.path().join("file"), "")?;
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_belay"))
        .args(["agent", "--config"])
        .arg(&path)
        .stdin(std::process::Stdio::null())
        .output()?;
    Ok((output.status.code(), String::from_utf8(output.stderr).context("not text")?))
}

#[test]
fn configuration_that_cannot_be_is_refused_by_key_and_line() -> Result<()> {
    let folders = "state_dir = \"{folder}/state\"\nruntime_dir = \"{folder}/run\"\n";
    for (text, code, words) in [
        ("not toml", 2, &["line 1"][..]),
        ("state_dri = \"/x\"", 2, &["line 1", "did you mean `state_dir`?"]),
        ("[link]\nlisten_on = \"0.0.0.0:1\"", 2, &["line 2", "did you mean `listen`?"]),
        ("[exchange]\nbandwidth_bytes_per_s = \"100M\"", 2, &["line 2", "bandwidth_bytes_per_s", "u64"]),
        ("[link]\ndead_after_ms = \"3s\"", 2, &["line 2", "dead_after_ms"]),
        ("[data_plane]\nspin_us = -1", 2, &["line 2", "spin_us"]),
        ("[[device]]\nname = \"d\"\npaht = \"/x\"", 2, &["line 3", "did you mean `path`?"]),
        ("[vmm]\nallow_args = \"*\"", 2, &["line 2", "allow_args", "sequence"]),
        ("state_dir = \"{folder}/file/x\"\nruntime_dir = \"{folder}/run\"", 1, &["cannot create", "/file/x"]),
        ("state_dir = \"{folder}/state\"\nruntime_dir = \"{folder}/file\"", 1, &["/file"]),
        ("state_dir = \"{folder}/state\"\nruntime_dir = \"{folder}/run\"\nhost_name = 5", 2, &["host_name"]),
    ] {
        let (ended, said) = agent(text)?;
        ensure!(ended == Some(code), "{text}: {ended:?} {said}");
        for word in words {
            ensure!(said.contains(word), "{text}: no {word:?} in: {said}");
        }
    }
    let (ended, said) = agent(&format!("{folders}[vmm]\nuser = \"no-such-user\""))?;
    ensure!(ended == Some(1) && said.contains("no-such-user"), "{ended:?} {said}");
    Ok(())
}
