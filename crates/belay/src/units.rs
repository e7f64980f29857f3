//! Sizes and rates, as people write them: `10G`, `1.5GiB`, `100M/s`. All units are powers of 1024.

const SUFFIXES: [(char, u32); 4] = [('k', 10), ('m', 20), ('g', 30), ('t', 40)];
const NAMES: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// Reads a size in bytes: a number with an optional `K`, `M`, `G` or `T`, which may be followed by `B` or `iB`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let refuse = || format!("`{text}` is no size; write for example `512M`, `10G` or `1.5T`");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = shift_of(unit.trim()).ok_or_else(refuse)?;
    let bytes = scaled(number, shift).ok_or_else(refuse)?;
    if bytes == 0 {
        return Err("the size must be more than nothing".into());
    }
    Ok(bytes)
}

/// Reads a rate in bytes per second: a size, with an optional `/s`.
pub(crate) fn parse_rate(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let size = trimmed.strip_suffix("/s").unwrap_or(trimmed);
    parse_size(size)
        .map_err(|_| format!("`{text}` is no rate; write for example `100M`, `500MB/s` or `1.5GiB/s`"))
}

fn shift_of(unit: &str) -> Option<u32> {
    let mut letters = unit.chars();
    let Some(first) = letters.next() else { return Some(0) };
    let rest = letters.as_str();
    if first == 'b' {
        return rest.is_empty().then_some(0);
    }
    let (_, shift) = SUFFIXES.iter().find(|(letter, _)| *letter == first)?;
    matches!(rest, "" | "b" | "ib").then_some(*shift)
}

/// `number` times 2^`shift`, exactly: whole part and fraction are scaled as integers.
fn scaled(number: &str, shift: u32) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 12 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let whole: u128 = u128::from(whole.parse::<u64>().ok()?) << shift;
    let part = if fraction.is_empty() {
        0
    } else {
        let digits = u128::from(fraction.parse::<u64>().ok()?);
        (digits << shift) / 10_u128.pow(u32::try_from(fraction.len()).ok()?)
    };
    u64::try_from(whole + part).ok()
}

/// Prints a size: `10 GiB`, `1.5 GiB`, `512 B`.
pub(crate) fn size(bytes: u64) -> String {
    let mut unit = 0;
    let mut tenths = u128::from(bytes) * 10;
    while tenths >= 10_240 && unit + 1 < NAMES.len() {
        tenths = (tenths + 512) / 1024;
        unit += 1;
    }
    let name = NAMES[unit];
    match tenths % 10 {
        0 => format!("{} {name}", tenths / 10),
        tenth => format!("{}.{tenth} {name}", tenths / 10),
    }
}

/// Prints a duration in microseconds: `85 µs`, `1.2 ms`, `3.0 s`.
pub(crate) fn micros(value: u64) -> String {
    match value {
        0..1_000 => format!("{value} µs"),
        1_000..1_000_000 => format!("{}.{} ms", value / 1_000, value % 1_000 / 100),
        _ => format!("{}.{} s", value / 1_000_000, value % 1_000_000 / 100_000),
    }
}

/// How many percent `part` is of `whole`, rounded down: 100 means all of it.
pub(crate) fn percent(part: u64, whole: u64) -> u64 {
    if whole == 0 {
        return 100;
    }
    u64::try_from(u128::from(part.min(whole)) * 100 / u128::from(whole)).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_all_spellings_are_powers_of_1024() {
        for (text, bytes) in [
            ("512", 512),
            ("512B", 512),
            ("1k", 1 << 10),
            ("100M", 100 << 20),
            ("10G", 10 << 30),
            ("10 GiB", 10 << 30),
            ("10GB", 10 << 30),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            ("0.5k", 512),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in
            ["", "G", "-1G", "1X", "1GG", "1.G", ".5G", "1e3", "0", "99999999T", "10G/s", "1.2.3G", "1bb"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_may_say_per_second_or_not() {
        assert_eq!(parse_rate("100M"), Ok(100 << 20));
        assert_eq!(parse_rate("500MB/s"), Ok(500 << 20));
        assert_eq!(parse_rate("1.5GiB/s"), Ok(3 << 29));
        assert!(parse_rate("1G/m").unwrap_err().contains("rate"));
    }

    #[test]
    fn sizes_are_printed_with_one_digit_at_most() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1 KiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(10 << 40), "10 TiB");
        assert_eq!(size(u64::MAX), "16777216 TiB");
    }

    #[test]
    fn durations_are_printed_in_the_unit_that_fits() {
        assert_eq!(micros(85), "85 µs");
        assert_eq!(micros(1_250), "1.2 ms");
        assert_eq!(micros(3_000_000), "3.0 s");
    }

    #[test]
    fn percent_is_a_hundred_only_when_all_is_there() {
        assert_eq!(percent(999, 1000), 99);
        assert_eq!(percent(1000, 1000), 100);
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
        assert_eq!(percent(0, 0), 100);
    }
}
