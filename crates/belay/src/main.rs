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
use crate::error::{Failure, Outcome};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    if let args::Command::Agent { config } = &cli.command {
        // It has a runtime of its own, with threads.
        return match belay_agent::run(config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => agent_failed(&error).report(json),
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

/// A configuration that cannot be used is asked wrongly; everything else failed.
fn agent_failed(error: &anyhow::Error) -> Failure {
    use belay_agent::config::ConfigError;
    let message = format!("{error:#}");
    match error.downcast_ref::<ConfigError>() {
        Some(error @ ConfigError::Read { .. }) => Failure::new(Outcome::Usage, error.to_string())
            .hint("every key has a default: an empty file will do; `--config` names another"),
        Some(error) => Failure::new(Outcome::Usage, error.to_string()),
        None => Failure::failed(message),
    }
}
