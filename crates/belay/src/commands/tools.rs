//! `belay api`, `belay metrics`, `belay completions` and `belay man`.

use std::path::Path;

use clap::CommandFactory;

use super::Context;
use crate::args::Cli;
use crate::error::Failure;
use crate::output;

/// Prints what the agent has at a path.
pub(super) async fn text(context: &Context, path: &str) -> Result<(), Failure> {
    output::print(context.client.get_text(path).await?.trim_end())
}

/// Prints completions for a shell.
pub(super) fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "belay", &mut script);
    output::print(String::from_utf8_lossy(&script).trim_end())
}

/// Writes a manual page per command.
pub(super) fn man(directory: &Path) -> Result<(), Failure> {
    let written =
        std::fs::create_dir_all(directory).and_then(|()| clap_mangen::generate_to(Cli::command(), directory));
    written.map_err(|error| {
        Failure::failed(format!("could not write the manual pages to {}: {error}", directory.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_manual_page_for_every_command() {
        let directory = tempfile::tempdir().unwrap();
        man(&directory.path().join("man1")).unwrap();
        for page in ["belay.1", "belay-migrate.1", "belay-device-add.1", "belay-host-invite.1"] {
            assert!(directory.path().join("man1").join(page).is_file(), "{page}");
        }
    }
}
