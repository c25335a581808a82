//! When a [`Schedule`] is open, and when that changes.
//!
//! A schedule is open when a clock on the wall of its time zone shows a time inside one of its windows. So in the
//! hour that is repeated in autumn a window opens twice if it lies within that hour, and one that lies in the hour
//! that is skipped in spring does not open at all.

use super::host_policy::Schedule;
use jiff::{Timestamp, ToSpan};

/// Seconds of a civil day.
const DAY: u32 = 86_400;
/// How far [`next_boundaries`] looks. A weekly window changes twice a week, so 32 changes are 16 weeks.
const DAYS: i64 = 140;

/// What is known of a schedule from a time on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundaries {
    /// Is it open at the start?
    pub open: bool,
    /// When it changes, ascending, all after the start.
    pub at: Vec<Timestamp>,
    /// From here on nothing is known; `None` = it never changes after the last of `at`.
    pub horizon: Option<Timestamp>,
}

/// Is the schedule open?
pub fn is_open(schedule: &Schedule, at: Timestamp) -> bool {
    let local = schedule.zone.to_datetime(at);
    let day = local.weekday().to_monday_one_offset();
    let second = u32::try_from(local.hour()).unwrap_or(0) * 3600
        + u32::try_from(local.minute()).unwrap_or(0) * 60
        + u32::try_from(local.second()).unwrap_or(0);
    schedule.windows.iter().any(|&(d, start, end)| i16::from(d) == i16::from(day) && start <= second && second < end)
}

/// `Some` where the schedule is always open or never.
fn constant(schedule: &Schedule) -> Option<bool> {
    if schedule.windows.iter().all(|&(_, start, end)| start >= end) {
        return Some(false);
    }
    let whole = (1..=7u8).all(|day| {
        let mut of_day: Vec<_> = schedule.windows.iter().filter(|w| w.0 == day).map(|w| (w.1, w.2)).collect();
        of_day.sort_unstable();
        let covered = of_day.iter().try_fold(0u32, |upto, &(start, end)| (start <= upto).then_some(upto.max(end)));
        covered.is_some_and(|upto| upto >= DAY)
    });
    whole.then_some(true)
}

/// The next `count` changes after `from`.
///
/// Every edge of a window and every change of the zone's offset is a candidate; those at which [`is_open`] answers as
/// before are dropped. So there is one definition of "open", and no case for summer time.
pub fn next_boundaries(schedule: &Schedule, from: Timestamp, count: usize) -> Boundaries {
    if let Some(open) = constant(schedule) {
        return Boundaries { open, at: Vec::new(), horizon: None };
    }
    let first = schedule.zone.to_datetime(from).date();
    let mut candidates = Vec::new();
    // One day back: a zone may repeat an hour across midnight.
    for offset in -1..=DAYS {
        let Ok(date) = first.checked_add(offset.days()) else { break };
        let day = date.weekday().to_monday_one_offset();
        for &(_, start, end) in schedule.windows.iter().filter(|w| i16::from(w.0) == i16::from(day)) {
            for edge in [start, end] {
                let Ok(local) = date.at(0, 0, 0, 0).checked_add(i64::from(edge).seconds()) else { continue };
                let instant = schedule.zone.to_ambiguous_timestamp(local);
                candidates.extend([instant.earlier(), instant.later()].into_iter().flatten());
            }
        }
    }
    // The last day may miss an edge that the day after it repeats: what is known ends one day earlier.
    let end = from.checked_add((24 * (DAYS - 1)).hours()).unwrap_or(Timestamp::MAX);
    candidates.extend(schedule.zone.following(from).map(|t| t.timestamp()).take_while(|t| *t < end));
    candidates.retain(|at| *at > from && *at < end);
    candidates.sort_unstable();

    let mut boundaries = Boundaries { open: is_open(schedule, from), at: Vec::new(), horizon: Some(end) };
    let mut open = boundaries.open;
    for at in candidates {
        // Between two candidates nothing changes, so the one where the answer differs is the change itself.
        if is_open(schedule, at) != open {
            open = !open;
            boundaries.at.push(at);
            if boundaries.at.len() == count {
                boundaries.horizon = Some(at);
                break;
            }
        }
    }
    boundaries
}

#[cfg(test)]
mod tests {
    use super::super::schedule::parse;
    use super::*;

    fn schedule(zone: &str, windows: &[(u8, u32, u32)]) -> Schedule {
        Schedule {
            text: format!("{zone} {windows:?}"),
            zone: jiff::tz::TimeZone::get(zone).unwrap(),
            windows: windows.to_vec(),
        }
    }
    fn ts(s: &str) -> Timestamp {
        s.parse().unwrap()
    }

    #[test]
    fn weekday_window() {
        let s = schedule("Europe/Amsterdam", &[(1, 8 * 3600, 18 * 3600)]);
        let b = next_boundaries(&s, ts("2026-11-01T00:00:00Z"), 4);
        assert!(!b.open);
        let want: Vec<_> =
            ["2026-11-02T07:00:00Z", "2026-11-02T17:00:00Z", "2026-11-09T07:00:00Z", "2026-11-09T17:00:00Z"]
                .map(ts)
                .to_vec();
        assert_eq!(b.at, want);
        assert_eq!(b.horizon, Some(want[3]));
    }

    #[test]
    fn summer_time() {
        // 29 March 2026: 02:00 → 03:00. The skipped window does not open.
        let s = schedule("Europe/Amsterdam", &[(7, 2 * 3600, 3 * 3600)]);
        assert_eq!(next_boundaries(&s, ts("2026-03-28T00:00:00Z"), 1).at, [ts("2026-04-05T00:00:00Z")]);
        // 25 October 2026: 03:00 → 02:00. A window within the repeated hour opens twice.
        let s = schedule("Europe/Amsterdam", &[(7, 2 * 3600 + 900, 2 * 3600 + 1800)]);
        let want =
            ["2026-10-25T00:15:00Z", "2026-10-25T00:30:00Z", "2026-10-25T01:15:00Z", "2026-10-25T01:30:00Z"].map(ts);
        assert_eq!(next_boundaries(&s, ts("2026-10-24T00:00:00Z"), 4).at, want);
    }

    #[test]
    fn over_midnight_is_one_window() {
        let s = schedule("UTC", &[(1, 22 * 3600, 86_400), (2, 0, 6 * 3600)]);
        let b = next_boundaries(&s, ts("2026-11-02T00:00:00Z"), 2);
        assert_eq!(b.at, [ts("2026-11-02T22:00:00Z"), ts("2026-11-03T06:00:00Z")]);
    }

    #[test]
    fn always_and_never() {
        let all: Vec<_> = (1..=7).map(|d| (d, 0, 86_400)).collect();
        let b = next_boundaries(&schedule("UTC", &all), ts("2026-11-02T00:00:00Z"), 2);
        assert_eq!(b, Boundaries { open: true, at: vec![], horizon: None });
        let b = next_boundaries(&schedule("UTC", &[(1, 5, 5)]), ts("2026-11-02T00:00:00Z"), 2);
        assert_eq!(b, Boundaries { open: false, at: vec![], horizon: None });
    }

    /// Against the clock on the wall, minute by minute, over both changes of the year and a zone with odd offsets.
    #[test]
    fn agrees_with_the_wall_clock() {
        for zone in ["Europe/Amsterdam", "America/New_York", "Australia/Lord_Howe", "UTC", "America/Havana"] {
            let s =
                schedule(zone, &[(7, 0, 5400), (7, 6000, 9000), (1, 80_000, 86_400), (6, 82_800, 86_400), (4, 1, 59)]);
            for from in ["2026-03-05T10:07:00Z", "2026-03-26T00:00:00Z", "2026-10-01T00:00:00Z", "2026-10-29T23:59:59Z"]
            {
                let from = ts(from);
                let b = next_boundaries(&s, from, 20);
                let horizon = b.horizon.unwrap();
                let (mut t, mut next) = (from, 0);
                while t < horizon {
                    while next < b.at.len() && b.at[next] <= t {
                        next += 1;
                    }
                    assert_eq!(is_open(&s, t), b.open ^ (next % 2 == 1), "{zone} {t}");
                    t += 53.seconds();
                }
            }
        }
    }

    fn next(schedule: &str, from: &str, n: usize) -> (bool, Vec<String>) {
        let Boundaries { open, at, horizon: _ } = next_boundaries(&parse(schedule).unwrap(), ts(from), n);
        (open, at.iter().map(Timestamp::to_string).collect())
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
    fn over_midnight_is_one_opening_as_written() {
        let schedule = "Fri 22:00-02:00 UTC";
        assert_eq!(
            next(schedule, "2026-01-09T00:00:00Z", 2),
            (false, vec!["2026-01-09T22:00:00Z".into(), "2026-01-10T02:00:00Z".into()])
        );
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
    fn agrees_with_the_wall_clock_as_written() {
        for text in [
            "Mon-Fri 08:00-18:00 Europe/Amsterdam",
            "Sat-Mon 22:30-03:15; Wed 00:00-24:00 America/New_York",
            "daily 01:30-02:30 Australia/Lord_Howe",
            "Mon,Wed,Fri 23:00-23:59; Tue 00:00-00:01 Pacific/Apia",
        ] {
            let schedule = parse(text).unwrap();
            for start in [
                "2026-03-06T00:00:00Z",
                "2026-03-27T00:00:00Z",
                "2026-04-03T00:00:00Z",
                "2026-10-02T00:00:00Z",
                "2026-10-24T00:00:00Z",
                "2011-12-28T00:00:00Z",
            ] {
                let from = ts(start);
                let Boundaries { mut open, at: list, horizon: _ } = next_boundaries(&schedule, from, 40);
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
}
