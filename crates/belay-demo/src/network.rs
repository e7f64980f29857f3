//! What joins the two hosts: network namespaces with a pair of virtual Ethernet devices, or loopback addresses.

use std::net::TcpListener;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The port of agents that have a network of their own.
const PORT: u16 = 7420;

/// The hosts' places in the network. Dropped, it takes the namespaces away.
#[derive(Default)]
pub(crate) struct Network {
    /// One for each host, or none.
    namespaces: Vec<String>,
    /// Address and port for each host's agent.
    pub(crate) endpoints: [String; 2],
}

impl Network {
    /// Namespaces as root, where they can be made (a container may not), loopback addresses otherwise; it says which.
    pub(crate) fn separate() -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Self::loopback();
        }
        let mut network = Self::default();
        match network.make_namespaces() {
            Ok(()) => Ok(network),
            Err(error) => {
                crate::say(&format!(
                    "no network namespaces here ({error:#}): both hosts have loopback addresses"
                ));
                Self::loopback()
            }
        }
    }

    /// Loopback addresses.
    pub(crate) fn loopback() -> Result<Self> {
        let endpoint = |address: &str| -> Result<String> {
            // Free now, and chosen by the kernel from thousands: nobody will take it meanwhile.
            let port = TcpListener::bind((address, 0))?.local_addr()?.port();
            Ok(format!("{address}:{port}"))
        };
        Ok(Self { namespaces: Vec::new(), endpoints: [endpoint("127.0.0.1")?, endpoint("127.0.0.2")?] })
    }

    /// The namespace of the first or second host, if it has one.
    pub(crate) fn namespace(&self, host: usize) -> Option<String> {
        self.namespaces.get(host).cloned()
    }

    fn make_namespaces(&mut self) -> Result<()> {
        let id = std::process::id();
        let names = [1, 2].map(|number| format!("belay-{id}-{number}"));
        for name in &names {
            run("ip", &["netns", "add", name])?;
            self.namespaces.push(name.clone());
            run("ip", &["-n", name, "link", "set", "lo", "up"])?;
        }
        let devices = [format!("bl{id}a"), format!("bl{id}b")];
        let [a, b] = &devices;
        run(
            "ip",
            &["link", "add", a, "netns", &names[0], "type", "veth", "peer", "name", b, "netns", &names[1]],
        )?;
        for (number, (name, device)) in (1..).zip(names.iter().zip(&devices)) {
            let address = format!("10.213.77.{number}");
            run("ip", &["-n", name, "addr", "add", &format!("{address}/24"), "dev", device])?;
            run("ip", &["-n", name, "link", "set", device, "up"])?;
            self.endpoints[number - 1] = format!("{address}:{PORT}");
        }
        // Also what is needed to run something there.
        run("ip", &["netns", "exec", &names[0], "true"])
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.namespaces {
            let _ = run("ip", &["netns", "del", name]);
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output =
        Command::new(program).args(arguments).output().with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
