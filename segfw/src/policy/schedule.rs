//! "Mon-Fri 08:00-18:00; Sat 10:00-12:00 Europe/Amsterdam": weekly windows in a time zone, as they are written. When
//! they open and close is told by `window`.
//!
//! Zones come from the database inside the program, not from the host, so a policy means the same everywhere.

use super::host_policy::Schedule;
use super::problem::{Fault, nearest, quote};
use jiff::tz::TimeZoneDatabase;
use std::sync::LazyLock;

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
/// Seconds of a day on the wall: also of one that is 23 hours long.
const DAY_S: u32 = 86_400;
/// Windows of one schedule. Each costs parts of a timeline in the kernel.
const WINDOWS: usize = 64;

/// Unpacked once: the list has some six hundred names.
static ZONES: LazyLock<TimeZoneDatabase> = LazyLock::new(TimeZoneDatabase::bundled);
static ZONE_NAMES: LazyLock<Vec<String>> =
    LazyLock::new(|| ZONES.available().map(|name| name.as_str().to_owned()).collect());

/// Days and times, then the zone, which is the last word.
pub fn parse(text: &str) -> Result<Schedule, Fault> {
    let offset = |part: &str| -> usize {
        // `part` is a slice of `text`, so the difference of the addresses is where it starts.
        let bytes = (part.as_ptr() as usize).saturating_sub(text.as_ptr() as usize);
        text.get(..bytes).map_or(0, |before| before.chars().count())
    };
    const FORM: &str = "a schedule reads \"Mon-Fri 08:00-18:00 Europe/Amsterdam\"";
    let trimmed = text.trim();
    let Some((windows_text, zone_name)) = trimmed.rsplit_once(char::is_whitespace) else {
        return Err(Fault::new(0, format!("bad schedule {}", quote(text)), FORM));
    };
    if zone_name.contains(':') || windows_text.trim_end().ends_with(';') {
        return Err(
            Fault::new(offset(zone_name), "the schedule has no time zone", FORM).help("add a zone, such as UTC")
        );
    }
    let Ok(zone) = ZONES.get(zone_name) else {
        let what = format!("unknown time zone {}", quote(zone_name));
        return Err(Fault::new(offset(zone_name), what, "a zone has its name in the IANA database")
            .meant(nearest(zone_name, ZONE_NAMES.iter().map(String::as_str))));
    };
    let mut windows = Vec::new();
    for part in windows_text.split(';') {
        let mut words = part.split_whitespace();
        let (Some(days_text), Some(times), None) = (words.next(), words.next(), words.next()) else {
            return Err(Fault::new(offset(part.trim_start()), format!("bad window {}", quote(part.trim())), FORM));
        };
        let Some((start_text, end_text)) = times.split_once('-') else {
            return Err(Fault::new(offset(times), format!("bad times {}", quote(times)), "times read 08:00-18:00"));
        };
        let (start, end) = (time(start_text, offset(start_text))?, time(end_text, offset(end_text))?);
        if start == end || start == DAY_S {
            let fault =
                Fault::new(offset(times), format!("the window {} is empty", quote(times)), "it ends when it begins");
            return Err(fault.help("a whole day is 00:00-24:00"));
        }
        for day in days(days_text, offset(days_text))? {
            if start < end {
                windows.push((day, start, end));
            } else {
                windows.push((day, start, DAY_S));
                if end > 0 {
                    windows.push((day % 7 + 1, 0, end));
                }
            }
        }
        if windows.len() > WINDOWS {
            return Err(Fault::new(
                offset(part),
                "the schedule has too many windows",
                format!("at most {WINDOWS}, counted by day"),
            ));
        }
    }
    windows.sort_unstable();
    windows.dedup();
    Ok(Schedule { text: text.to_owned(), zone, windows })
}

/// `HH:MM`, 00:00 to 24:00, in seconds.
fn time(text: &str, offset: usize) -> Result<u32, Fault> {
    let fault = || Fault::new(offset, format!("bad time {}", quote(text)), "a time reads HH:MM, from 00:00 to 24:00");
    let (hour, minute) = text.split_once(':').ok_or_else(fault)?;
    let number =
        |s: &str| (s.len() == 2 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse::<u32>().ok()).flatten();
    match (number(hour), number(minute)) {
        (Some(h), Some(m)) if h < 24 && m < 60 || (h, m) == (24, 0) => Ok(h * 3600 + m * 60),
        _ => Err(fault()),
    }
}

/// `Mon-Fri`, `Mon,Wed,Fri`, `Fri-Mon`, `daily`. 1 = Monday.
fn days(text: &str, offset: usize) -> Result<Vec<u8>, Fault> {
    if text == "daily" {
        return Ok((1..=7).collect());
    }
    let day = |name: &str| -> Result<u8, Fault> {
        match DAYS.iter().zip(1u8..).find(|(d, _)| d.eq_ignore_ascii_case(name)) {
            Some((_, n)) => Ok(n),
            None => {
                let fault = Fault::new(
                    offset,
                    format!("unknown day {}", quote(name)),
                    "Mon, Tue, Wed, Thu, Fri, Sat, Sun, or daily",
                );
                let full = DAYS.iter().find(|d| name.get(..3).is_some_and(|n| n.eq_ignore_ascii_case(d)));
                Err(fault.meant(full.copied().or_else(|| nearest(name, DAYS))))
            }
        }
    };
    let mut all = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            None => all.push(day(part)?),
            Some((first, last)) => {
                let (first, last) = (day(first)?, day(last)?);
                // Over the weekend too: Fri-Mon has four days.
                let count = (last + 7 - first) % 7 + 1;
                all.extend((0..count).map(|i| (first - 1 + i) % 7 + 1));
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_midnight_is_two_windows() {
        for (text, windows) in [
            ("Fri 22:00-02:00 UTC", vec![(5, 79_200, 86_400), (6, 0, 7_200)]),
            ("Sun 23:00-00:00 UTC", vec![(7, 82_800, 86_400)]),
            ("Sun 23:00-01:00 UTC", vec![(1, 0, 3_600), (7, 82_800, 86_400)]),
        ] {
            assert_eq!(parse(text).unwrap().windows, windows, "{text}");
        }
    }

    #[test]
    fn faults_have_columns() {
        for (text, offset, what, help) in [
            ("Mon-Fri 08:00-18:00", 8, "the schedule has no time zone", Some("add a zone, such as UTC")),
            (
                "Mon-Fri 08:00-18:00 Europe/Amstredam",
                20,
                "unknown time zone \"Europe/Amstredam\"",
                Some("did you mean \"Europe/Amsterdam\"?"),
            ),
            ("Mon-Fri 8:00-18:00 UTC", 8, "bad time \"8:00\"", None),
            ("Mon-Fri 08:00-24:01 UTC", 14, "bad time \"24:01\"", None),
            ("Monday 08:00-18:00 UTC", 0, "unknown day \"Monday\"", Some("did you mean \"Mon\"?")),
            ("Mon 08:00-08:00 UTC", 4, "the window \"08:00-08:00\" is empty", Some("a whole day is 00:00-24:00")),
            ("Mon 08:00 UTC", 4, "bad times \"08:00\"", None),
            ("08:00-18:00 UTC", 0, "bad window \"08:00-18:00\"", None),
            ("Mon 08:00-18:00; UTC", 17, "the schedule has no time zone", Some("add a zone, such as UTC")),
            ("UTC", 0, "bad schedule \"UTC\"", None),
            ("", 0, "bad schedule \"\"", None),
        ] {
            let fault = parse(text).unwrap_err();
            assert_eq!((fault.offset, fault.what.as_str(), fault.help.as_deref()), (offset, what, help), "{text}");
        }
    }
}
