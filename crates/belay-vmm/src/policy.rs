//! Which of QEMU's arguments another host may choose for a VM that it sends here. No I/O.
//!
//! A QEMU argument can read, write and run anything as the user that QEMU runs as. What a host's own operator starts
//! is the operator's business; what another host asks for is checked here. Allowed is what gives the guest nothing of
//! this host: the machine, its CPUs and memory, emulated devices, user networking, consoles that go to files and
//! sockets of this VM. Everything else is refused, unknown options and devices too, unless the operator's
//! configuration names it: see [`Policy`].

mod rules;

use std::path::Path;

pub(crate) use self::rules::is_own_output;
use self::rules::{Rule, Source};
use crate::adopt::options::{KeyValues, WITHOUT_VALUE, pairs};
use crate::spec::VmSpec;

/// The name of the key with more arguments.
const ALLOW_ARGS: &str = "allow_args";
/// The name of the key with folders.
const ALLOW_PATHS: &str = "allow_paths";

/// What this host lets others choose.
pub struct Policy<'a> {
    /// More arguments than the harmless ones: `-option`, `-option KIND` (what stands first in the value, such as `tap`),
    /// or `-option VALUE`, in which `*` stands for any characters but commas. A single `*` allows everything.
    pub allow_args: &'a [String],
    /// Whether QEMU may read this file: it is in one of the operator's folders.
    pub may_read: &'a dyn Fn(&Path) -> bool,
}

/// An argument that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forbidden {
    /// The argument, or the specification's key, with its value.
    pub argument: String,
    /// The configuration's key, in `[vmm]`, that would allow it.
    pub key: &'static str,
    /// What that key would have to contain.
    pub entry: String,
}

impl std::fmt::Display for Forbidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { argument, key, entry } = self;
        write!(
            f,
            "`{argument}` may not be chosen by another host; `{key} = [{entry:?}]` under [vmm] would allow it"
        )
    }
}

impl Policy<'_> {
    /// Everything in a specification of another host that is refused here; empty if it may be started.
    #[must_use]
    pub fn forbidden(&self, spec: &VmSpec) -> Vec<Forbidden> {
        if self.allow_args.iter().any(|entry| entry.trim() == "*") {
            return Vec::new();
        }
        let mut found = Vec::new();
        let files = [("kernel", &spec.kernel), ("initrd", &spec.initrd)];
        for (key, file) in files {
            let Some(file) = file.as_deref().filter(|file| !(self.may_read)(file)) else { continue };
            found.push(forbidden_path(format!("{key} = {:?}", file.display().to_string()), file));
        }
        let arguments = spec.adopted.as_ref().map_or(&spec.args, |adopted| &adopted.arguments);
        for (option, value) in pairs(arguments) {
            found.extend(self.refuse(spec, &option, value.as_deref()));
        }
        found
    }

    fn refuse(&self, spec: &VmSpec, option: &str, value: Option<&str>) -> Option<Forbidden> {
        let text = value.unwrap_or_default();
        let argument = [option, text].join(" ").trim().to_owned();
        let rule = Rule::of(option);
        let source = Source { vm: &spec.name, disks: &spec.disks, may_read: self.may_read };
        // What looks like an option may be one, if QEMU does not take it for the value that it stands in place of.
        let whole = match rule {
            Some(Rule::Flag) => true,
            Some(Rule::Anything) => value.is_some(),
            _ => !text.starts_with('-') && (value.is_some() || WITHOUT_VALUE.contains(&option)),
        };
        if whole && self.allow_args.iter().any(|entry| named(entry, option, text)) {
            return None;
        }
        let outcome = match rule {
            Some(rule) if whole => rule.check(&source, text),
            _ => Err(None),
        };
        let file = outcome.err()?;
        if let Some(file) = file {
            return Some(forbidden_path(argument, &file));
        }
        let kind = KeyValues::parse(text).first.filter(|_| rules::KINDS.contains(&option));
        let entry = match kind {
            _ if option.is_empty() || !whole => "*".to_owned(),
            Some(kind) => format!("{option} {kind}"),
            None => option.to_owned(),
        };
        Some(Forbidden { argument, key: ALLOW_ARGS, entry })
    }
}

fn forbidden_path(argument: String, file: &Path) -> Forbidden {
    let folder = file.parent().unwrap_or(file);
    Forbidden { argument, key: ALLOW_PATHS, entry: folder.display().to_string() }
}

/// Whether an entry of `allow_args` names this argument.
fn named(entry: &str, option: &str, value: &str) -> bool {
    let (name, pattern) = entry.trim().split_once(' ').unwrap_or((entry.trim(), ""));
    let pattern = pattern.trim();
    let name = name.strip_prefix('-').filter(|name| name.starts_with('-')).unwrap_or(name);
    name == option
        && !option.is_empty()
        && (pattern.is_empty()
            || KeyValues::parse(value).first.as_deref() == Some(pattern)
            || fits(pattern.as_bytes(), value.as_bytes()))
}

/// Whether `text` fits `pattern`, in which `*` stands for any characters but commas.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) if fits(rest, text) => true,
        (Some((b'*', _)), Some((byte, left))) => *byte != b',' && fits(pattern, left),
        (Some((wanted, rest)), Some((byte, left))) => wanted == byte && fits(rest, left),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
