//! "Mon-Fri 08:00-18:00; Sat 10:00-12:00 Europe/Amsterdam": weekly windows in a time zone, and when they open and close.
//!
//! A window is open exactly while a clock on the wall in that zone shows a time inside it. So a window in the hour that
//! is skipped in spring does not open, and one in the hour that comes twice in autumn is open twice.
//!
//! Zones come from the database inside the program, not from the host, so a policy means the same everywhere.

use super::host_policy::Schedule;
use super::problem::{Fault, nearest, quote};
use jiff::tz::TimeZoneDatabase;
use jiff::{Timestamp, ToSpan, civil};
use std::collections::BTreeSet;
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
        return Err(Fault::new(offset(zone_name), "the schedule has no time zone", FORM).help("add a zone, such as UTC"));
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
            let fault = Fault::new(offset(times), format!("the window {} is empty", quote(times)), "it ends when it begins");
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
            return Err(Fault::new(offset(part), "the schedule has too many windows", format!("at most {WINDOWS}, counted by day")));
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
    let number = |s: &str| (s.len() == 2 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse::<u32>().ok()).flatten();
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
                let fault = Fault::new(offset, format!("unknown day {}", quote(name)), "Mon, Tue, Wed, Thu, Fri, Sat, Sun, or daily");
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

/// Whether a clock on the wall shows a time inside a window.
pub fn is_open(schedule: &Schedule, now: Timestamp) -> bool {
    let local = schedule.zone.to_datetime(now);
    let day = u8::try_from(local.weekday().to_monday_one_offset()).unwrap_or(0);
    let second = u32::try_from(i64::from(local.hour()) * 3600 + i64::from(local.minute()) * 60 + i64::from(local.second()));
    schedule.windows.iter().any(|(d, start, end)| *d == day && second.is_ok_and(|s| (*start..*end).contains(&s)))
}

/// Whether the schedule is open at `from`, and the next `n` instants, each after `from`, at which that changes.
/// Fewer than `n` where it never changes again, or not before the end of jiff's time (year 9999).
pub fn boundaries(schedule: &Schedule, from: Timestamp, n: usize) -> (bool, Vec<Timestamp>) {
    let open_now = is_open(schedule, from);
    let mut open = open_now;
    let mut found = Vec::new();
    let mut instants = BTreeSet::new();
    let Ok(mut date) = schedule.zone.to_datetime(from).date().checked_sub(1.day()) else { return (open_now, found) };
    // Every window comes once a week, except where the clock skips it; an always open schedule has no boundary.
    let weeks = n.saturating_add(4);
    for _ in 0..weeks.saturating_mul(7) {
        if found.len() >= n {
            break;
        }
        // What can change on this date: the edges of the windows, and the jumps of the clock itself.
        let Ok(noon) = date.at(12, 0, 0, 0).to_zoned(schedule.zone.clone()) else { break };
        let noon = noon.timestamp();
        let (Ok(first), Ok(last)) = (noon.checked_sub(36.hours()), noon.checked_add(36.hours())) else { break };
        let jumps: Vec<Timestamp> =
            schedule.zone.following(first).map(|t| t.timestamp()).take_while(|t| *t <= last).collect();
        let mut offsets = vec![schedule.zone.to_offset(first)];
        offsets.extend(jumps.iter().map(|t| schedule.zone.to_offset(*t)));
        offsets.dedup();
        let day = u8::try_from(date.weekday().to_monday_one_offset()).unwrap_or(0);
        for (_, start, end) in schedule.windows.iter().filter(|(d, ..)| *d == day) {
            for edge in [*start, *end] {
                let Ok(wall) = civil::DateTime::from_parts(date, civil::Time::midnight()).checked_add(i64::from(edge).seconds())
                else {
                    continue;
                };
                instants.extend(offsets.iter().filter_map(|offset| offset.to_timestamp(wall).ok()));
            }
        }
        instants.extend(jumps);
        // No wall clock is more than a day away from the offset at noon, so no later date adds anything before this.
        let settled = instants.split_off(&first);
        for instant in std::mem::replace(&mut instants, settled) {
            if found.len() < n && instant > from && is_open(schedule, instant) != open {
                open = !open;
                found.push(instant);
            }
        }
        let Ok(next) = date.tomorrow() else { break };
        date = next;
    }
    (open_now, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }
    fn next(schedule: &str, from: &str, n: usize) -> (bool, Vec<String>) {
        let (open, list) = boundaries(&parse(schedule).unwrap(), at(from), n);
        (open, list.iter().map(Timestamp::to_string).collect())
    }

    #[test]
    fn office_hours() {
        let schedule = "Mon-Fri 08:00-18:00 Europe/Amsterdam";
        // 2026-01-05 is a Monday; Amsterdam is at +01.
        assert_eq!(
            next(schedule, "2026-01-05T12:00:00Z", 3),
            (true, vec!["2026-01-05T17:00:00Z".into(), "2026-01-06T07:00:00Z".into(), "2026-01-06T17:00:00Z".into()])
        );
        // Friday evening: closed until Monday.
        assert_eq!(next(schedule, "2026-01-09T17:00:00Z", 1), (false, vec!["2026-01-12T07:00:00Z".into()]));
        // At the very moment of opening it is open, and the boundary is past.
        assert_eq!(next(schedule, "2026-01-05T07:00:00Z", 1), (true, vec!["2026-01-05T17:00:00Z".into()]));
    }

    #[test]
    fn over_midnight_is_one_opening() {
        let schedule = "Fri 22:00-02:00 UTC";
        assert_eq!(parse(schedule).unwrap().windows, [(5, 79_200, 86_400), (6, 0, 7_200)]);
        assert_eq!(
            next(schedule, "2026-01-09T00:00:00Z", 2),
            (false, vec!["2026-01-09T22:00:00Z".into(), "2026-01-10T02:00:00Z".into()])
        );
        assert_eq!(parse("Sun 23:00-00:00 UTC").unwrap().windows, [(7, 82_800, 86_400)]);
        assert_eq!(parse("Sun 23:00-01:00 UTC").unwrap().windows, [(1, 0, 3_600), (7, 82_800, 86_400)]);
    }

    #[test]
    fn clocks_forward() {
        // 2026-03-29: 02:00 +01 becomes 03:00 +02. The day has 23 hours.
        assert_eq!(
            next("Sun 01:00-04:00 Europe/Amsterdam", "2026-03-28T12:00:00Z", 2),
            (false, vec!["2026-03-29T00:00:00Z".into(), "2026-03-29T02:00:00Z".into()])
        );
        // Starts inside the gap: open as soon as the clock is past it.
        assert_eq!(
            next("Sun 02:30-04:00 Europe/Amsterdam", "2026-03-28T12:00:00Z", 2),
            (false, vec!["2026-03-29T01:00:00Z".into(), "2026-03-29T02:00:00Z".into()])
        );
        // Wholly inside the gap: no such time on that day.
        assert_eq!(
            next("Sun 02:00-03:00 Europe/Amsterdam", "2026-03-28T12:00:00Z", 1),
            (false, vec!["2026-04-05T00:00:00Z".into()])
        );
    }

    #[test]
    fn clocks_back() {
        // 2026-10-25: 03:00 +02 becomes 02:00 +01. The hour from 02:00 comes twice.
        assert_eq!(
            next("Sun 01:00-04:00 Europe/Amsterdam", "2026-10-24T12:00:00Z", 2),
            (false, vec!["2026-10-24T23:00:00Z".into(), "2026-10-25T03:00:00Z".into()])
        );
        assert_eq!(
            next("Sun 02:15-02:45 Europe/Amsterdam", "2026-10-24T12:00:00Z", 4),
            (
                false,
                vec![
                    "2026-10-25T00:15:00Z".into(),
                    "2026-10-25T00:45:00Z".into(),
                    "2026-10-25T01:15:00Z".into(),
                    "2026-10-25T01:45:00Z".into()
                ]
            )
        );
    }

    #[test]
    fn always_open_has_no_boundary() {
        assert_eq!(next("Mon-Sun 00:00-24:00 Europe/Amsterdam", "2026-03-28T12:00:00Z", 8), (true, vec![]));
        assert_eq!(next("daily 00:00-24:00 UTC", "2026-03-28T12:00:00Z", 8), (true, vec![]));
    }

    #[test]
    fn agrees_with_the_clock_on_the_wall() {
        for text in [
            "Mon-Fri 08:00-18:00 Europe/Amsterdam",
            "Sat-Mon 22:30-03:15; Wed 00:00-24:00 America/New_York",
            "daily 01:30-02:30 Australia/Lord_Howe",
            "Mon,Wed,Fri 23:00-23:59; Tue 00:00-00:01 Pacific/Apia",
        ] {
            let schedule = parse(text).unwrap();
            for start in ["2026-03-06T00:00:00Z", "2026-03-27T00:00:00Z", "2026-04-03T00:00:00Z", "2026-10-02T00:00:00Z", "2026-10-24T00:00:00Z", "2011-12-28T00:00:00Z"] {
                let from = at(start);
                let (mut open, list) = boundaries(&schedule, from, 40);
                assert_eq!(list.len(), 40);
                let mut list = list.into_iter().peekable();
                for minute in 0..60 * 24 * 6 {
                    let now = from + (minute as i64).minutes();
                    while list.next_if(|b| *b <= now).is_some() {
                        open = !open;
                    }
                    assert_eq!(open, is_open(&schedule, now), "{text} at {now}");
                }
            }
        }
    }

    #[test]
    fn faults_have_columns() {
        for (text, offset, what, help) in [
            ("Mon-Fri 08:00-18:00", 8, "the schedule has no time zone", Some("add a zone, such as UTC")),
            ("Mon-Fri 08:00-18:00 Europe/Amstredam", 20, "unknown time zone \"Europe/Amstredam\"", Some("did you mean \"Europe/Amsterdam\"?")),
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
