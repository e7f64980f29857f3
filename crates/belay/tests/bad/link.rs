//! The port that is open to the network.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use anyhow::{Result, ensure};
use belay_e2e::{Host, LIMIT, Peer, until};

use super::{fails_with, with_bed, work_together};

fn connect(host: &Host) -> Result<TcpStream> {
    let stream = TcpStream::connect(host.address())?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Sends it, and waits until the agent has ended the connection.
fn say(host: &Host, bytes: &[u8]) -> Result<()> {
    let mut stream = connect(host)?;
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
    Ok(())
}

fn logged(host: &Host, words: &str) -> Result<()> {
    until(&format!("{words:?} in the log of {}", host.name), || Ok(host.log().contains(words).then_some(())))
}

#[test]
fn garbage_and_cut_off_callers_are_rejected_with_the_reason_and_peers_go_on() {
    with_bed(|bed| {
        let hello = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
        let zeroes = [0; 5000];
        // The beginning of a TLS record that is announced to be longer.
        for bytes in [&hello[..], &zeroes, &[0xff; 70_000], &[22, 3, 1, 64, 0, 1, 0], b"BELAYHLO", b""] {
            for host in [&bed.a, &bed.b] {
                say(host, bytes)?;
            }
        }
        logged(&bed.a, "a connection was rejected")?;
        logged(&bed.a, "TLS handshake failed")?;
        work_together(bed)
    });
}

#[test]
fn silent_callers_do_not_keep_peers_out_and_are_not_without_number() {
    with_bed(|bed| {
        let mut silent = Vec::new();
        for _ in 0..400 {
            silent.push(connect(&bed.a)?);
            silent.push(connect(&bed.b)?);
        }
        work_together(bed)?;
        // The first ones had to make room.
        for stream in &mut silent[..2] {
            ensure!(stream.read(&mut [0]).unwrap_or(0) == 0);
        }
        for host in [&bed.a, &bed.b] {
            let pid = std::fs::read_to_string(host.folder.join("agent.pid"))?;
            let descriptors = std::fs::read_dir(format!("/proc/{}/fd", pid.trim()))?.count();
            ensure!(descriptors < 256 + 100, "the agent of {} has {descriptors} descriptors", host.name);
            logged(host, "too many callers at once")?;
        }
        Ok(())
    });
}

#[test]
fn peer_that_opens_lines_and_says_nothing_leaves_the_others_theirs() {
    with_bed(|bed| {
        let third = Peer::new(&bed.enrol("host-c")?)?;
        let mut lines = Vec::new();
        for _ in 0..40 {
            lines.push(third.line(&bed.a)?);
        }
        work_together(bed)?;
        for (at, line) in lines.iter_mut().enumerate() {
            // Not frames, and ones that are too long.
            let _ = line.send_bytes(if at % 2 == 0 { &[0xff; 64] } else { &[b'B'; 5] });
        }
        work_together(bed)
    });
}

#[test]
fn token_that_is_used_expired_garbled_or_of_another_cluster_lets_nobody_in() {
    with_bed(|bed| {
        let pki = |name: &str| bed.a.folder.join(name).display().to_string();
        let invite = |host: &Host, more: &[&str]| -> Result<String> {
            let (keys, address) = (host.pki(), host.address().to_owned());
            let line = [&["host", "invite", "--pki", &keys, "--address", &address][..], more].concat();
            Ok(host.json(&line)?["token"].as_str().unwrap_or_default().to_owned())
        };
        let join = |token: &str, code: i32, words: &[&str]| {
            let keys = pki("none");
            let line =
                ["host", "join", token, "--name", "host-x", "--address", "127.0.0.3:1", "--pki", &keys];
            fails_with(&bed.a, code, &line, words)
        };
        let used = invite(&bed.a, &[])?;
        let keys = pki("host-d");
        bed.a.belay(&[
            "host",
            "join",
            &used,
            "--name",
            "host-d",
            "--address",
            "127.0.0.3:1",
            "--pki",
            &keys,
        ])?;
        join(&used, 1, &["was used already", "belay host invite"])?;
        join(&invite(&bed.a, &["--expires", "0s"])?, 1, &["expired", "belay host invite"])?;
        join(&used[..used.len() - 3], 2, &["damaged"])?;
        join("nonsense", 2, &["token"])?;
        logged(&bed.a, "the token was used already")?;
        logged(&bed.a, "the token has expired")?;
        // A token of another cluster, whose host would be at the address of this one.
        let other = pki("other");
        bed.a.belay(&["host", "init", "--name", "host-a", "--pki", &other])?;
        let line = ["host", "invite", "--pki", &other, "--address", bed.a.address()];
        let foreign = bed.a.json(&line)?["token"].as_str().unwrap_or_default().to_owned();
        join(&foreign, 1, &["token's cluster", "nothing was sent"])?;
        // And a host of that cluster, at the port of this one.
        let stranger = Peer::new(std::path::Path::new(&other))?;
        ensure!(stranger.line(&bed.a).is_err());
        work_together(bed)
    });
}
