//! One module per group of commands.

mod device;
mod events;
mod exchange;
mod host;
mod migrate;
mod status;
mod tools;
mod vm;

use std::path::{Path, PathBuf};

use crate::args::{Cli, Command};
use crate::client::Client;
use crate::error::Failure;

/// What every command has at hand.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) json: bool,
}

/// Runs a command.
pub(crate) async fn run(cli: Cli) -> Result<(), Failure> {
    let context = Context { client: Client::new(&cli.socket), json: cli.json };
    match cli.command {
        Command::Agent { .. } => Err(Failure::failed("the agent is run before anything else")),
        Command::Status { watch } => status::run(&context, watch).await,
        Command::Events { follow } => events::run(&context, follow).await,
        Command::Device(command) => device::run(&context, command).await,
        Command::Exchange(args) => exchange::run(&context, args).await,
        Command::Vm(command) => vm::run(&context, command).await,
        Command::Migrate(args) => migrate::run(&context, args).await,
        Command::Operation { id } => migrate::show(&context, &id).await,
        Command::Host(command) => host::run(&context, command).await,
        Command::Api => tools::text(&context, "/openapi.json").await,
        Command::Metrics => tools::text(&context, "/metrics").await,
        Command::Completions { shell } => tools::completions(shell),
        Command::Man { directory } => tools::man(&directory),
    }
}

/// The agent's working directory is another: paths go to it absolute.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::failed(format!("`{}` can not be made absolute: {error}", path.display())))
}
