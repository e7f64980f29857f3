//! What goes to standard output.

use std::io::{self, Write};

use serde_json::Value;

use crate::error::Failure;

/// Prints a line, or several. When the reader went away, as with `| head`, the command ends: nobody reads the rest.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Failure::failed(format!("could not print: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// Prints an answer as it came, for people who also read JSON.
pub(crate) fn print_json(value: &Value) -> Result<(), Failure> {
    print(&format!("{value:#}"))
}

/// What can break a terminal is shown escaped: names and messages come from elsewhere.
pub(crate) fn plain(text: &str) -> String {
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}

/// Columns below their headings, as wide as what stands in them.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|heading| (*heading).to_owned()).collect()] }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [&str; N]) {
        self.rows
            .push(cells.iter().map(|cell| if cell.is_empty() { "-".into() } else { plain(cell) }).collect());
    }

    /// The table as text, without a line break at the end.
    pub(crate) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells: Vec<String> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            cells.join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// `name: value` lines, the values below each other.
pub(crate) fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    let line = |(name, value): &(&str, String)| format!("{:<width$} {}", format!("{name}:"), plain(value));
    facts.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cell() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(["a-long-name", "ready"]);
        table.row(["b", ""]);
        assert_eq!(table.text(), "NAME         STATE\na-long-name  ready\nb            -");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let mut table = Table::new(&["NAME"]);
        table.row(["a\u{1b}[2Jb"]);
        assert!(!table.text().contains('\u{1b}'));
        assert_eq!(plain("µs"), "µs");
    }

    #[test]
    fn facts_stand_below_each_other() {
        assert_eq!(facts(&[("id", "1".into()), ("state", "up".into())]), "id:    1\nstate: up");
    }
}
