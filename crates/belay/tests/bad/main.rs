//! Bad input to real agents: each is refused with what is wrong and what to do, and nothing else suffers.

mod api;
mod codes;
mod configuration;
mod files;
mod link;
mod vmm;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use belay_e2e::{Bed, Host};

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

/// What a command that must fail like this says, on both outputs.
fn fails(host: &Host, code: i32, arguments: &[&str]) -> Result<String> {
    let output = host.spawn(arguments)?.wait()?;
    let said = String::from_utf8([output.stdout, output.stderr].concat()).context("not text")?;
    ensure!(output.status.code() == Some(code), "belay {}: {} {said}", arguments.join(" "), output.status);
    Ok(said)
}

/// As [`fails`]; what it says has all of this in it.
fn fails_with(host: &Host, code: i32, arguments: &[&str], words: &[&str]) -> Result<()> {
    let said = fails(host, code, arguments)?;
    for word in words {
        ensure!(said.contains(word), "belay {}: no {word:?} in: {said}", arguments.join(" "));
    }
    Ok(())
}

/// Both agents answer, and work with each other.
fn work_together(bed: &Bed) -> Result<()> {
    bed.a.belay(&["device", "add", "probe", "--driver", "memory", "--size", "1M"])?;
    bed.a.belay(&["device", "offer", "probe", bed.b.name])?;
    bed.a.belay(&["device", "withdraw", "probe"])?;
    bed.a.belay(&["device", "remove", "probe"]).map(drop)
}
