//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::units::{parse_rate, parse_size};

/// Where the agent listens unless it is said otherwise.
const DEFAULT_SOCKET: &str = "/run/belay/agent.sock";
/// Where a host's keys and certificates are unless it is said otherwise.
const DEFAULT_PKI: &str = "/var/lib/belay/pki";

const TOP_EXAMPLES: &str = "\
First steps:
  belay host init --name host-a
  belay device add data --path /srv/data.img --size 10G
  belay vm run web.toml
  belay migrate web host-b
  belay status --watch

Exit codes: 0 done, 1 failed, 2 asked wrongly, 3 refused by a check, 4 cancelled, 5 another host owns the device,
6 another host can not be reached.";

/// Serves devices to virtual machines, and moves running machines between hosts without stopping their I/O.
#[derive(Debug, Parser)]
#[command(name = "belay", version, after_help = TOP_EXAMPLES, max_term_width = 110)]
pub(crate) struct Cli {
    /// The agent's socket
    #[arg(long, global = true, value_name = "PATH", env = "BELAY_SOCKET", default_value = DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,
    /// Print JSON, for scripts
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run this host's agent
    #[command(after_help = "\
Examples:
  belay agent --config /etc/belay/agent.toml
  BELAY_LOG=debug belay agent --config agent.toml

Every key of the configuration has a default: an empty file will do. The agent ends at SIGTERM;
virtual machines go on, and their devices wait until it is back.")]
    Agent {
        /// The configuration file (TOML)
        #[arg(long, default_value = "/etc/belay/agent.toml")]
        config: std::path::PathBuf,
    },
    /// Show devices, machines, hosts and what is going on
    #[command(after_help = "Examples:\n  belay status\n  belay status --watch\n  belay status --json")]
    Status {
        /// Show it again every second until Ctrl-C
        #[arg(long)]
        watch: bool,
    },
    /// Show what happened
    #[command(
        after_help = "Examples:\n  belay events\n  belay events --follow\n  belay events --follow --json"
    )]
    Events {
        /// Go on with what happens from now on, until Ctrl-C
        #[arg(long)]
        follow: bool,
    },
    /// Add, show, resize and remove devices
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Bring a device's data to the host that uses it, while it is used
    #[command(after_help = "\
Examples:
  belay exchange data --wait
  belay exchange data --path /srv/data.img --bandwidth 200M
  belay exchange data --bandwidth 50MB/s
  belay exchange data --cancel

With --bandwidth alone, an exchange that runs already gets the new limit.")]
    Exchange(ExchangeArgs),
    /// Run, adopt, list and stop virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Move a running machine to another host
    #[command(after_help = "\
Examples:
  belay migrate web host-b --dry-run
  belay migrate web host-b
  belay migrate web host-b --mode stay
  belay migrate web host-b --bandwidth 500MB/s --no-wait

Ctrl-C takes the migration back as long as that is possible; after that it goes on in the background.")]
    Migrate(MigrateArgs),
    /// Show an operation, for example a migration
    #[command(after_help = "Examples:\n  belay operation 5f1c\n  belay operation 5f1c --json")]
    Operation {
        /// Its id, as `belay status` shows it
        id: String,
    },
    /// Make a cluster, join it, and see who belongs to it
    #[command(subcommand)]
    Host(HostCommand),
    /// Print the OpenAPI description of the agent's API
    #[command(after_help = "Example:\n  belay api")]
    Api,
    /// Print the agent's metrics in the Prometheus text format
    #[command(after_help = "Example:\n  belay metrics")]
    Metrics,
    /// Print completions for a shell
    #[command(after_help = "Examples:\n  belay completions bash\n  belay completions zsh")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages to a directory
    #[command(after_help = "Example:\n  belay man /usr/local/share/man/man1")]
    Man {
        /// The directory; it is made if it is not there
        directory: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// Serve a file or block device as a virtual disk
    #[command(after_help = "\
Examples:
  belay device add data --path /srv/data.img --size 10G
  belay device add root --path /dev/vg0/root --queues 4 --vm web
  belay device add iso --path /srv/install.img --read-only --buffered
  belay device add slow --path /srv/slow.img --delay 2ms --block-size 4096 --serial SLOW1
  belay device add cheap --path /srv/cheap.img --throttle-iops 500 --throttle-bandwidth 50M
  belay device add bad --path /srv/bad.img --fault kind=write,errno=5,every=100
  belay device add scratch --driver memory --size 256M")]
    Add(DeviceAddArgs),
    /// List the devices
    #[command(after_help = "Example:\n  belay device list")]
    List,
    /// Show all about a device
    #[command(after_help = "Example:\n  belay device show data")]
    Show {
        /// The device's name
        name: String,
    },
    /// Stop serving a device; its data stays
    #[command(after_help = "Example:\n  belay device remove data")]
    Remove {
        /// The device's name
        name: String,
    },
    /// Let another host take a device when its machine migrates there, by whatever means
    #[command(after_help = "\
Examples:
  belay device offer data host-b
  belay device offer data host-b --mode stay --json
  belay device offer data host-b --dry-run

Use it before a migration with libvirt or with your own QMP: when it returns, the other host serves the
socket that it prints, and the machine there may be started with it. `belay migrate` does all of it by itself.")]
    Offer {
        /// The device's name
        name: String,
        /// The host that the machine goes to, as `belay host list` shows it
        host: String,
        /// Whether its data follows, or stays here and is used over the network
        #[arg(long, value_enum, default_value_t = Mode::Follow)]
        mode: Mode,
        /// Only check whether it would work
        #[arg(long)]
        dry_run: bool,
    },
    /// Take an offer back, when the machine has not migrated
    #[command(after_help = "Example:\n  belay device withdraw data")]
    Withdraw {
        /// The device's name
        name: String,
    },
    /// Make a device larger; its machine notices at once
    #[command(after_help = "Example:\n  belay device resize data 20G")]
    Resize {
        /// The device's name
        name: String,
        /// The new size, for example 20G
        #[arg(value_parser = parse_size)]
        size: u64,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DeviceAddArgs {
    /// What to call it
    pub(crate) name: String,
    /// The file or block device with its data
    #[arg(long, required_unless_present = "driver", required_if_eq("driver", "file"))]
    pub(crate) path: Option<PathBuf>,
    /// What keeps the data
    #[arg(long, value_enum, default_value_t = Driver::File)]
    pub(crate) driver: Driver,
    /// Create the file, of this size, for example 10G; the size of a device without a file
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// How many queues the machine may use
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: u16,
    /// The size of a block, in bytes
    #[arg(long, value_enum, value_name = "BYTES", default_value_t = BlockSize::B512)]
    pub(crate) block_size: BlockSize,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The serial number that the machine sees
    #[arg(long)]
    pub(crate) serial: Option<String>,
    /// The machine that it belongs to
    #[arg(long)]
    pub(crate) vm: Option<String>,
    /// Let every request take at least this long, for example 2ms: for trying things out
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) delay: Option<Duration>,
    /// Limit it to so many requests per second
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) throttle_iops: Option<u64>,
    /// Limit it to so much data per second, for example 100M
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) throttle_bandwidth: Option<u64>,
    /// Let requests fail, for trying things out: `errno=N` and any of `kind=read|write|flush|discard|write_zeroes`,
    /// `offset=BYTES`, `len=BYTES`, `every=N`, `first=N`; may be given more than once
    #[arg(long, value_name = "RULE", value_parser = parse_fault)]
    pub(crate) fault: Vec<serde_json::Value>,
    /// Use the host's page cache, instead of direct I/O
    #[arg(long)]
    pub(crate) buffered: bool,
}

/// What keeps a device's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Driver {
    /// A regular file or a block device
    File,
    /// The agent's memory: lost with it
    Memory,
    /// Nothing: reads as zeroes
    Null,
}

impl Driver {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Memory => "memory",
            Self::Null => "null",
        }
    }
}

/// The block sizes that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BlockSize {
    #[value(name = "512")]
    B512,
    #[value(name = "4096")]
    B4096,
}

impl BlockSize {
    pub(crate) fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ExchangeArgs {
    /// The device's name
    pub(crate) device: String,
    /// The limit for the copying, for example 100M (per second)
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) bandwidth: Option<u64>,
    /// Where the data goes on this host
    #[arg(long)]
    pub(crate) path: Option<PathBuf>,
    /// End the exchange; the data stays where it was
    #[arg(long, conflicts_with_all = ["bandwidth", "path", "wait"])]
    pub(crate) cancel: bool,
    /// Wait until all data is here
    #[arg(long)]
    pub(crate) wait: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Start a machine whose disks are served by the agent
    #[command(after_help = "Example:\n  belay vm run web.toml")]
    Run {
        /// The machine's description
        #[arg(value_name = "SPEC.toml")]
        spec: PathBuf,
    },
    /// Take over a machine that runs already and uses the agent's devices
    #[command(after_help = "\
Examples:
  belay vm adopt web --qmp /run/web.qmp
  belay vm adopt web --qmp /run/web.qmp --device root --device data

QEMU must have been started with Belay's sockets (`-chardev socket,path=…` of `belay device show`), shared memory, and
a QMP socket that nobody else uses from now on. Its own command line says how it is started at another host.")]
    Adopt {
        /// What to call it
        name: String,
        /// QEMU's QMP socket
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// A device that it uses, if QEMU sees its socket at another path; recognised by the file's name
        #[arg(long = "device", value_name = "DEVICE")]
        devices: Vec<String>,
    },
    /// List the machines
    #[command(after_help = "Example:\n  belay vm list")]
    List,
    /// Stop a machine
    #[command(after_help = "Example:\n  belay vm stop web")]
    Stop {
        /// The machine's name
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// The machine's name
    pub(crate) vm: String,
    /// The host that it goes to, as `belay host list` shows it
    pub(crate) host: String,
    /// Whether its data follows, or stays here and is used over the network
    #[arg(long, value_enum, default_value_t = Mode::Follow)]
    pub(crate) mode: Mode,
    /// The limit for copying its memory, for example 500MB/s
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(crate) bandwidth: Option<u64>,
    /// Only check whether it would work
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Start it and return at once; `belay operation` tells how it goes
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) no_wait: bool,
}

/// What becomes of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// The data follows the machine, while it runs
    Follow,
    /// The data stays, and is used over the network
    Stay,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Follow => "follow",
            Self::Stay => "stay",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Pki {
    /// The directory of this host's keys and certificates
    #[arg(long = "pki", value_name = "DIR", default_value = DEFAULT_PKI)]
    pub(crate) directory: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Make a cluster, with this host as its first
    #[command(after_help = "Example:\n  belay host init --name host-a")]
    Init {
        /// This host's name: lower-case letters, digits, `-` and `.`
        #[arg(long)]
        name: String,
        #[command(flatten)]
        pki: Pki,
    },
    /// Join a cluster with a token
    #[command(after_help = "\
Example:
  belay host join belay1.TOKEN --name host-b --address 192.0.2.11:7420

The token comes from `belay host invite` on the first host, whose agent must be running.")]
    Join {
        /// What `belay host invite` printed
        token: String,
        /// This host's name: lower-case letters, digits, `-` and `.`
        #[arg(long)]
        name: String,
        /// Where this host's agent is reached by the others; may be given more than once
        #[arg(long = "address", value_name = "HOST:PORT", required = true)]
        addresses: Vec<String>,
        #[command(flatten)]
        pki: Pki,
    },
    /// Print a token with which one other host can join
    #[command(after_help = "\
Examples:
  belay host invite --address 192.0.2.10:7420
  belay host invite --address 192.0.2.10:7420 --expires 15m")]
    Invite {
        /// Where this host's agent is reached by the others; may be given more than once
        #[arg(long = "address", value_name = "HOST:PORT", required = true)]
        addresses: Vec<String>,
        /// How long the token is good for
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_duration)]
        expires: Duration,
        #[command(flatten)]
        pki: Pki,
    },
    /// List the hosts of the cluster
    #[command(after_help = "Example:\n  belay host list")]
    List {
        #[command(flatten)]
        pki: Pki,
    },
    /// Forget another host, and refuse its certificate on this host
    #[command(after_help = "\
Example:
  belay host remove host-b

Run it on every host. Connections that stand end when the agent is restarted. The host can be enrolled again.")]
    Remove {
        /// Its name
        name: String,
        #[command(flatten)]
        pki: Pki,
    },
    /// Renew this host's certificate, on the host that made the cluster
    #[command(after_help = "Example:\n  belay host renew")]
    Renew {
        #[command(flatten)]
        pki: Pki,
    },
}

/// Keys of a rule for failing requests whose values are numbers.
const FAULT_NUMBERS: [&str; 5] = ["errno", "offset", "len", "every", "first"];
const FAULT_KINDS: [&str; 5] = ["read", "write", "flush", "discard", "write_zeroes"];

fn parse_fault(text: &str) -> Result<serde_json::Value, String> {
    let refuse = |what: &str| format!("{what}; write for example `kind=write,errno=5,every=100`");
    let mut rule = serde_json::Map::new();
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or_else(|| refuse(&format!("`{part}` has no `=`")))?;
        let value = match key {
            "kind" if FAULT_KINDS.contains(&value) => value.into(),
            "kind" => return Err(refuse(&format!("`{value}` is none of {}", FAULT_KINDS.join(", ")))),
            key if FAULT_NUMBERS.contains(&key) => {
                value.parse::<u32>().map_err(|_| refuse(&format!("`{value}` is no number")))?.into()
            }
            _ => return Err(refuse(&format!("`{key}` is none of kind, {}", FAULT_NUMBERS.join(", ")))),
        };
        rule.insert(key.to_owned(), value);
    }
    if !rule.contains_key("errno") {
        return Err(refuse("`errno` is missing, the error that they fail with"));
    }
    Ok(serde_json::Value::Object(rule))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("`{text}` is no time; write for example `2ms`, `15m` or `1h`"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// Every command line that a document shows is one.
    #[test]
    fn commands_in_documents_are_understood() {
        let documents =
            [include_str!("../../../README.md"), include_str!("../../../docs/operating.md"), TOP_EXAMPLES];
        let mut count = 0;
        for line in documents.iter().flat_map(|text| text.lines()) {
            let Some(command) = line.trim_start().strip_prefix("belay ").filter(|_| line.starts_with("  "))
            else {
                continue;
            };
            let command = command.split(" #").next().unwrap_or_default();
            let words = std::iter::once("belay").chain(command.split_whitespace());
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("belay {command}: {error}");
            }
            count += 1;
        }
        assert!(count > 10, "only {count} commands were found");
    }

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    fn examples(command: &clap::Command, lines: &mut Vec<String>) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let before = lines.len();
        lines.extend(
            help.lines().filter_map(|line| line.strip_prefix("  belay ")).map(|rest| format!("belay {rest}")),
        );
        let leaf = command.get_subcommands().next().is_none();
        assert!(!leaf || lines.len() > before, "`{}` has no example", command.get_name());
        command.get_subcommands().for_each(|sub| examples(sub, lines));
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples_and_all_of_them_parse() {
        let mut lines = Vec::new();
        examples(&Cli::command(), &mut lines);
        assert!(lines.len() > 30);
        for line in lines {
            if let Err(error) = parse(&line) {
                panic!("`{line}`: {error}");
            }
        }
    }

    #[test]
    fn values_are_read_in_their_units() {
        let cli = parse("belay device add d --path /d --size 1.5G --delay 2ms --block-size 4096").unwrap();
        let Command::Device(DeviceCommand::Add(add)) = cli.command else { panic!("not `device add`") };
        assert_eq!(add.size, Some(3 << 29));
        assert_eq!(add.delay, Some(Duration::from_millis(2)));
        assert_eq!(add.block_size.bytes(), 4096);
        assert_eq!(add.queues, 1);
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for line in [
            "belay",
            "belay device add d",
            "belay device add d --path /d --queues 0",
            "belay device add d --driver file",
            "belay device add d --path /d --fault kind=write",
            "belay device add d --path /d --fault kind=erase,errno=5",
            "belay device add d --path /d --throttle-iops 0",
            "belay device add d --path /d --block-size 1000",
            "belay device resize d lots",
            "belay exchange d --cancel --wait",
            "belay migrate web",
            "belay device offer data",
            "belay device offer data host-b --mode maybe",
            "belay migrate web host-b --mode maybe",
            "belay migrate web host-b --dry-run --no-wait",
            "belay host invite --expires soon --address a:1",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn global_options_may_stand_behind_the_command() {
        let cli = parse("belay device list --json --socket /tmp/a.sock").unwrap();
        assert!(cli.json);
        assert_eq!(cli.socket, PathBuf::from("/tmp/a.sock"));
    }
}
