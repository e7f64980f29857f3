//! The `belay` command: what people and scripts use. It asks the agent over its Unix socket; only `belay host`
//! works on this host's keys itself.

mod args;
mod client;
mod commands;
mod error;
mod model;
mod output;
mod progress;
mod units;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;
use crate::error::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    if let args::Command::Agent { config } = &cli.command {
        // It has a runtime of its own, with threads.
        return match belay_agent::run(config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => Failure::failed(format!("{error:#}")).report(json),
        };
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(commands::run(cli)),
        Err(error) => Err(Failure::from(error)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(json),
    }
}
