//! What the documents name is there.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in ["", "docs", "docs/decisions"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            found.extend(path.extension().is_some_and(|end| end == "md").then_some(path));
        }
    }
    assert!(found.len() > 10, "{found:?}");
    found
}

/// Paths of this repository between backticks, and the targets of links.
fn named(text: &str) -> Vec<(bool, String)> {
    let folders = ["crates/", "docs/", "packaging/", "scripts/", ".ci/"];
    let quoted = text.split('`').skip(1).step_by(2);
    let paths = quoted.filter(|word| folders.iter().any(|folder| word.starts_with(folder)));
    let links = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    let links = links.filter(|target| !target.contains("://") && !target.starts_with('#'));
    paths.map(|path| (false, path.to_owned())).chain(links.map(|link| (true, link.to_owned()))).collect()
}

#[test]
fn every_path_that_a_document_names_exists() {
    let mut count = 0;
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for (is_link, path) in named(&text) {
            let base = if is_link { document.parent().unwrap().to_owned() } else { root() };
            let path = path.split(['#', ' ']).next().unwrap_or_default();
            assert!(base.join(path).exists(), "{} names {path}, which is not there", document.display());
            count += 1;
        }
    }
    assert!(count > 20, "only {count} paths were found");
}
