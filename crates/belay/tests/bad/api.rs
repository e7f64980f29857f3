//! The API's socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use belay_e2e::{Host, LIMIT};
use serde_json::Value;

use super::{with_bed, work_together};

fn send(host: &Host, bytes: &[u8]) -> Result<String> {
    let mut stream = UnixStream::connect(host.folder.join("agent.sock"))?;
    stream.set_read_timeout(Some(LIMIT))?;
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The status and the error of a call.
fn ask(host: &Host, method: &str, path: &str, body: &str) -> Result<(u16, Value)> {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    let answer = send(host, format!("{head}{body}").as_bytes())?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
    Ok((status, serde_json::from_str(body).with_context(|| format!("{method} {path}: {answer}"))?))
}

#[test]
fn requests_that_cannot_be_are_answered_in_the_form_of_all_errors() {
    with_bed(|bed| {
        bed.a.belay(&["device", "add", "d", "--driver", "memory", "--size", "1M"])?;
        let huge = format!("{{\"name\": \"{}\"}}", "x".repeat(4 << 20));
        for (method, path, body, status, words) in [
            ("POST", "/v1/devices", "{bad", 400, "line 1 column 2"),
            ("POST", "/v1/devices", "[1]", 400, "not understood"),
            ("POST", "/v1/devices", "\u{0}", 400, "not understood"),
            ("POST", "/v1/devices", r#"{"name":"q","pth":"/x"}"#, 400, "unknown field `pth`"),
            ("POST", "/v1/devices", r#"{"name":"../q","path":"/x"}"#, 400, "no name"),
            ("POST", "/v1/devices", huge.as_str(), 413, "length limit"),
            ("PUT", "/v1/devices", "", 405, "another method"),
            ("GET", "/v1/nothing", "", 404, "no such call"),
            ("GET", "/v1/devices/a%2F..%2Fb", "", 404, "no device a/../b"),
            ("GET", "/v1/devices/%ff", "", 400, "not understood"),
            ("GET", "/v1/events?follow=maybe", "", 400, "follow"),
            ("POST", "/v1/devices/d/resize", r#"{"size_bytes":-5}"#, 400, "expected u64"),
            ("POST", "/v1/devices/d/resize", r#"{"size_bytes":99999999999999999999}"#, 400, "expected u64"),
            ("POST", "/v1/devices/d/offer", r#"{"to":"../host"}"#, 409, "not known"),
            ("POST", "/v1/devices/d/offer", r#"{"to":"host-b","mode":"sideways"}"#, 400, "sideways"),
            ("POST", "/v1/vms", r#"{"spec_toml":"name="}"#, 400, "line 1"),
            ("POST", "/v1/vms", r#"{"spec_toml":"name='v'\nmemory_mb=3"}"#, 400, "did you mean `memory_mib`"),
            ("DELETE", "/v1/vms/none", "", 404, "no VM none"),
            ("GET", "/v1/operations/none", "", 404, "none"),
        ] {
            let (got, error) = ask(&bed.a, method, path, body)?;
            let message = error["message"].as_str().unwrap_or_default();
            ensure!(got == status && message.contains(words), "{method} {path}: {got} {error}");
            ensure!(error["code"].is_string(), "{error}");
        }
        for garbage in
            [&b"GARBAGE\r\n\r\n"[..], &[0xff; 9000], b"POST /v1/devices HTTP/1.1\r\ncontent-length: 9\r\n"]
        {
            let mut stream = UnixStream::connect(bed.a.folder.join("agent.sock"))?;
            let _ = stream.write_all(garbage);
        }
        work_together(bed)
    });
}
