//! QEMU's command line taken apart: options with their values, and the `key=value` lists in these.

/// Options of QEMU that have no value. All others have one.
pub(crate) const WITHOUT_VALUE: [&str; 43] = [
    "-S",
    "-daemonize",
    "-nodefaults",
    "-no-user-config",
    "-nodefconfig",
    "-nographic",
    "-no-reboot",
    "-no-shutdown",
    "-no-acpi",
    "-no-hpet",
    "-no-fd-bootchk",
    "-enable-kvm",
    "-no-kvm",
    "-only-migratable",
    "-mem-prealloc",
    "-snapshot",
    "-usb",
    "-preconfig",
    "-singlestep",
    "-win2k-hack",
    "-full-screen",
    "-alt-grab",
    "-ctrl-grab",
    "-portrait",
    "-curses",
    "-sdl",
    "-enable-sync-profile",
    "-enable-fips",
    "-semihosting",
    "-h",
    "-help",
    "-version",
    "-one-insn-per-tb",
    "-xen-attach",
    "-xen-domid-restrict",
    "-async-teardown",
    "-perfmap",
    "-jitdump",
    "-show-cursor",
    "-no-frame",
    "-no-quit",
    "-old-param",
    "-no-kvm-irqchip",
];

/// An option and its value. An argument that is no option (an image to boot from) has an empty name.
pub(crate) fn pairs(arguments: &[String]) -> Vec<(String, Option<String>)> {
    let mut pairs = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let Some(name) = argument.strip_prefix('-').filter(|name| !name.is_empty()) else {
            pairs.push((String::new(), Some(argument.clone())));
            continue;
        };
        // QEMU takes two dashes as one.
        let name = format!("-{}", name.strip_prefix('-').unwrap_or(name));
        let value = if WITHOUT_VALUE.contains(&name.as_str()) { None } else { arguments.next().cloned() };
        pairs.push((name, value));
    }
    pairs
}

/// A value such as `socket,id=a,path=/x,server=on`, or the same as JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyValues {
    /// What stands first without a key, such as `socket`.
    pub(crate) first: Option<String>,
    keys: Vec<(String, String)>,
}

impl KeyValues {
    /// Reads a value.
    pub(crate) fn parse(text: &str) -> Self {
        if text.starts_with('{')
            && let Ok(serde_json::Value::Object(object)) = serde_json::from_str(text)
        {
            let text = |value: &serde_json::Value| match value {
                serde_json::Value::String(text) => text.clone(),
                serde_json::Value::Bool(true) => "on".to_owned(),
                serde_json::Value::Bool(false) => "off".to_owned(),
                other => other.to_string(),
            };
            return Self {
                first: None,
                keys: object.iter().map(|(key, v)| (key.clone(), text(v))).collect(),
            };
        }
        let mut pieces = split(text).into_iter().peekable();
        let first = pieces.next_if(|piece| !piece.contains('='));
        let keys = pieces.map(|piece| match piece.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            // `server` is `server=on`, `nowait` is `wait=off`.
            None => match piece.strip_prefix("no") {
                Some(key) if key == "wait" || key == "server" || key == "delay" => {
                    (key.to_owned(), "off".to_owned())
                }
                _ => (piece, "on".to_owned()),
            },
        });
        Self { first, keys: keys.collect() }
    }

    /// The value of a key. A later one counts more than an earlier.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.keys.iter().rev().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    /// What it is: what stands first, or under this key.
    pub(crate) fn kind(&self, key: &str) -> &str {
        self.first.as_deref().or_else(|| self.get(key)).unwrap_or_default()
    }

    /// Whether a switch is on; `default` if it is not named.
    pub(crate) fn is_on(&self, key: &str, default: bool) -> bool {
        self.get(key).map_or(default, |value| matches!(value, "on" | "yes" | "true" | "y"))
    }

    /// Every key and value.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.keys.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.keys.retain(|(known, _)| known != key);
    }

    pub(crate) fn set(&mut self, key: &str, value: &str) {
        match self.keys.iter_mut().find(|(known, _)| known == key) {
            Some((_, present)) => value.clone_into(present),
            None => self.keys.push((key.to_owned(), value.to_owned())),
        }
    }
}

impl std::fmt::Display for KeyValues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys = self.keys.iter().map(|(key, value)| format!("{key}={}", value.replace(',', ",,")));
        let all: Vec<String> = self.first.iter().cloned().chain(keys).collect();
        f.write_str(&all.join(","))
    }
}

/// Splits at commas; a doubled comma is one that belongs to a value.
fn split(text: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            pieces.push(String::new());
        } else if let Some(piece) = pieces.last_mut() {
            piece.push(character);
        }
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_their_values_are_told_apart() {
        let line = "-nodefaults -m 1G --enable-kvm -append -x disk.img".split(' ').map(str::to_owned);
        let pairs = pairs(&line.collect::<Vec<_>>());
        let expected = [
            ("-nodefaults", None),
            ("-m", Some("1G")),
            ("-enable-kvm", None),
            ("-append", Some("-x")),
            ("", Some("disk.img")),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
        assert_eq!(pairs, expected);
    }

    #[test]
    fn doubled_commas_old_switches_and_json_are_read() {
        let value = KeyValues::parse("socket,id=a,path=/x,,y,server,nowait");
        assert_eq!((value.kind("backend"), value.get("path")), ("socket", Some("/x,y")));
        assert!(value.is_on("server", false) && !value.is_on("wait", true));
        assert_eq!(value.to_string(), "socket,id=a,path=/x,,y,server=on,wait=off");
        let json = KeyValues::parse(r#"{"qom-type":"memory-backend-memfd","share":true,"size":5}"#);
        assert_eq!((json.kind("qom-type"), json.get("size")), ("memory-backend-memfd", Some("5")));
        assert!(json.is_on("share", false));
    }
}
