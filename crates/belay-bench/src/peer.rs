//! The peers: QEMU's storage daemon, alone and as the client of `qemu-nbd` over mutual TLS.

use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use belay_e2e::until;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// Queues that the peer offers, as many as Belay's device.
pub(crate) const QUEUES: usize = 4;
/// The name in the server's certificate.
const SERVER: &str = "bench-server";

/// Where the peers' programs are.
#[derive(Clone, Debug)]
pub(crate) enum Programs {
    /// Installed.
    Installed,
    /// In a tree of unpacked packages, as `scripts/fetch-qemu10` makes it.
    Unpacked(PathBuf),
}

impl Programs {
    /// Those in `root`, if they are there; else the installed ones.
    pub(crate) fn find(root: &Path) -> Self {
        match root.canonicalize() {
            Ok(root) if root.join("usr/bin/qemu-nbd").is_file() => Self::Unpacked(root),
            _ => Self::Installed,
        }
    }

    fn command(&self, name: &str) -> Command {
        let Self::Unpacked(root) = self else { return Command::new(name) };
        let libraries = root.join("usr/lib").join(format!("{}-linux-gnu", std::env::consts::ARCH));
        let mut command = Command::new(root.join("usr/bin").join(name));
        command.env("QEMU_MODULE_DIR", libraries.join("qemu")).env("LD_LIBRARY_PATH", libraries);
        command
    }

    /// The version of a program, as it prints it.
    pub(crate) fn version(&self, name: &str) -> Result<String> {
        let output = self
            .command(name)
            .arg("--version")
            .output()
            .with_context(|| format!("cannot run {name}; scripts/setup installs it"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().next().unwrap_or("an unknown version");
        Ok(line.rsplit_once('/').map_or(line, |(_, rest)| rest).to_owned())
    }
}

/// Peer processes that serve one disk; dropped, they end.
pub(crate) struct Peer {
    pub(crate) socket: PathBuf,
    children: Vec<Child>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The storage daemon first, then the server that it uses.
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Peer {
    /// A file on this host: io_uring, no page cache, a thread of its own.
    pub(crate) fn local(programs: &Programs, folder: &Path, file: &Path) -> Result<Self> {
        let backend = format!("driver=file,node-name=disk,{}", file_options("", file));
        let mut peer = Self { socket: folder.join("peer.sock"), children: Vec::new() };
        peer.storage_daemon(programs, folder, &["--blockdev", &backend])?;
        Ok(peer)
    }

    /// A file behind `qemu-nbd`, which checks the client's certificate as the client checks the server's.
    pub(crate) fn remote(programs: &Programs, folder: &Path, file: &Path) -> Result<Self> {
        let keys = folder.join("tls");
        make_certificates(&keys)?;
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let mut peer = Self { socket: folder.join("peer.sock"), children: Vec::new() };
        let mut server = programs.command("qemu-nbd");
        server
            .arg("--object")
            .arg(credentials(&keys.join("server"), "server"))
            .args(["--tls-creds=tls", "--image-opts", "--persistent"])
            .args(["--shared=4", "--export-name=disk", "--bind=127.0.0.1", &format!("--port={port}")])
            .arg(format!("driver=raw,file.driver=file,{}", file_options("file.", file)));
        peer.start(&mut server, folder, "qemu-nbd", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        })?;
        let tls = credentials(&keys.join("client"), "client");
        let backend = format!(
            "driver=nbd,node-name=disk,server.type=inet,server.host=127.0.0.1,server.port={port},export=disk,\
             tls-creds=tls,tls-hostname={SERVER}"
        );
        peer.storage_daemon(programs, folder, &["--object", &tls, "--blockdev", &backend])?;
        Ok(peer)
    }

    fn storage_daemon(&mut self, programs: &Programs, folder: &Path, backend: &[&str]) -> Result<()> {
        let socket = self.socket.clone();
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,\
             num-queues={QUEUES},iothread=thread",
            socket.display()
        );
        let mut command = programs.command("qemu-storage-daemon");
        command.args(["--object", "iothread,id=thread"]).args(backend).args(["--export", &export]);
        self.start(&mut command, folder, "qemu-storage-daemon", || UnixStream::connect(&socket).is_ok())
    }

    fn start(
        &mut self,
        command: &mut Command,
        folder: &Path,
        name: &str,
        ready: impl Fn() -> bool,
    ) -> Result<()> {
        let log_path = folder.join(format!("{name}.log"));
        let log = std::fs::File::create(&log_path)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {name}; scripts/setup installs it"))?;
        self.children.push(child);
        let child = self.children.last_mut().context("a child")?;
        // What ends a bench that was killed (belay-e2e's reaper) finds its processes by these.
        std::fs::write(folder.join(format!("{name}.pid")), child.id().to_string())?;
        until(&format!("{name} that answers"), || {
            let said = || std::fs::read_to_string(&log_path).unwrap_or_default();
            ensure!(child.try_wait()?.is_none(), "{name} ended: {}", said());
            Ok(ready().then_some(()))
        })
    }
}

fn credentials(folder: &Path, endpoint: &str) -> String {
    format!("tls-creds-x509,id=tls,endpoint={endpoint},dir={},verify-peer=on", folder.display())
}

/// Makes a certificate authority, and a certificate for either side, as QEMU wants them.
fn make_certificates(folder: &Path) -> Result<()> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name.push(DnType::CommonName, "bench");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_pem = ca.self_signed(&ca_key)?.pem();
    let issuer = Issuer::from_params(&ca, &ca_key);
    for (side, name) in [("server", SERVER), ("client", "bench-client")] {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new([name.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        let folder = folder.join(side);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("ca-cert.pem"), &ca_pem)?;
        std::fs::write(folder.join(format!("{side}-cert.pem")), params.signed_by(&key, &issuer)?.pem())?;
        std::fs::write(folder.join(format!("{side}-key.pem")), key.serialize_pem())?;
    }
    Ok(())
}

/// A file through io_uring, past the page cache. The agent, which serves it in turn, has the lock.
fn file_options(prefix: &str, file: &Path) -> String {
    let options = [
        format!("filename={}", file.display()),
        "cache.direct=on".into(),
        "aio=io_uring".into(),
        "locking=off".into(),
    ];
    options.map(|option| format!("{prefix}{option}")).join(",")
}
