//! The flags of `segfw flows`. Written by hand, since `--not` negates the flag that follows it: order matters, and
//! clap's derive forgets it.

use crate::flow::query::{Clause, FLAGS, Filter, Query, time};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};
use jiff::Timestamp;

pub(super) const EXAMPLES: &str = "\
A filter given twice means either; different filters must all match; --not negates the next filter.

Examples:
  segfw flows                                          the last 20
  segfw flows -f --verdict DENIED                      refusals as they happen
  segfw flows --since 5m --from-label app=web --to-label app=payments,tier=db
  segfw flows --since 2026-11-21T20:00:00Z --until 1h --not --protocol udp
  segfw flows --last 100 --verdict AUDIT -o table      what enforcement would refuse
  segfw flows --ip 10.0.0.0/8 --port 5432 -o json | jq .rule";

/// Without a count, a time or `-f`: as Hubble.
const LAST: usize = 20;

/// What was typed.
#[derive(Debug)]
pub(super) struct QueryArgs {
    filter: Filter,
    since: Option<String>,
    until: Option<String>,
    last: Option<usize>,
    first: Option<usize>,
    follow: bool,
}

impl QueryArgs {
    /// Times become points in time, defaults are filled in.
    pub(super) fn settle(self, now: Timestamp) -> Result<Query, crate::flow::query::NotATime> {
        let Self { filter, since, until, last, first, follow } = self;
        let at = |text: Option<String>| text.map(|t| time(&t, now)).transpose();
        let bare = !follow && since.is_none() && until.is_none() && first.is_none();
        Ok(Query {
            filter,
            since: at(since)?,
            until: at(until)?,
            last: if bare { last.or(Some(LAST)) } else { last },
            first,
            follow,
        })
    }
}

impl Args for QueryArgs {
    fn augment_args(command: Command) -> Command {
        let count = |name: &'static str, help: &'static str| {
            Arg::new(name).long(name).value_name("N").value_parser(value_parser!(u32)).help(help)
        };
        let at = |name: &'static str, help: &'static str| {
            Arg::new(name).long(name).value_name("TIME").help(help).help_heading("Which and how many")
        };
        let command = command
            .arg(
                Arg::new("follow")
                    .short('f')
                    .long("follow")
                    .action(ArgAction::SetTrue)
                    .help("Go on with what comes")
                    .help_heading("Which and how many"),
            )
            .arg(count("last", "The newest N that match [default: 20]").help_heading("Which and how many"))
            .arg(count("first", "The oldest N that match").help_heading("Which and how many").conflicts_with("last"))
            .arg(at("since", "Not older: 5m, 2h30m, 1d, or 2026-11-21T20:00:00Z"))
            .arg(at("until", "Not newer: see --since"))
            .arg(
                // No value, but an index for each time it is given.
                Arg::new("not")
                    .long("not")
                    .action(ArgAction::Append)
                    .num_args(0)
                    .default_missing_value("not")
                    .help("Negates the next filter")
                    .help_heading("Filters"),
            );
        FLAGS.iter().fold(command, |command, (flag, value, help)| {
            command.arg(
                Arg::new(*flag)
                    .long(*flag)
                    .value_name(*value)
                    .action(ArgAction::Append)
                    .help(*help)
                    .help_heading("Filters"),
            )
        })
    }
    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for QueryArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let text = |name: &str| matches.get_one::<String>(name).cloned();
        let count = |name: &str| matches.get_one::<u32>(name).map(|n| *n as usize);
        Ok(Self {
            filter: clauses(matches).map_err(|m| clap::Error::raw(clap::error::ErrorKind::ValueValidation, m))?,
            since: text("since"),
            until: text("until"),
            last: count("last"),
            first: count("first"),
            follow: matches.get_flag("follow"),
        })
    }
    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The filters in the order in which they were typed.
fn clauses(matches: &ArgMatches) -> Result<Filter, String> {
    let mut typed: Vec<(usize, &str, &str)> = Vec::new();
    for flag in FLAGS.iter().map(|f| f.0).chain(["not"]) {
        if let (Some(at), Some(values)) = (matches.indices_of(flag), matches.get_many::<String>(flag)) {
            typed.extend(at.zip(values).map(|(i, value)| (i, flag, value.as_str())));
        }
    }
    typed.sort_unstable();
    let mut not = false;
    let mut clauses = Vec::new();
    for (_, flag, value) in typed {
        if flag == "not" {
            if not {
                return Err("--not is given twice in a row".to_owned());
            }
            not = true;
        } else {
            clauses.push(Clause::parse(flag, value, not).map_err(|e| e.to_string())?);
            not = false;
        }
    }
    if not {
        return Err("--not stands in front of a filter; there is none behind it".to_owned());
    }
    Ok(Filter(clauses))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The query as it goes to the agent.
    fn query(line: &str) -> Query {
        let command = QueryArgs::augment_args(Command::new("flows").no_binary_name(true));
        let matches = command.try_get_matches_from(line.split_whitespace()).unwrap();
        QueryArgs::from_arg_matches(&matches).unwrap().settle("2026-11-21T20:00:00Z".parse().unwrap()).unwrap()
    }

    #[test]
    fn not_negates_the_next_filter_only() {
        let Query { filter, .. } =
            query("--verdict DENIED --not --protocol udp --port 53 --not --ip=10.0.0.0/8 --verdict AUDIT");
        let clause = |flag, value, not| Clause::parse(flag, value, not).unwrap();
        let want = Filter(vec![
            clause("verdict", "DENIED", false),
            clause("protocol", "udp", true),
            clause("port", "53", false),
            clause("ip", "10.0.0.0/8", true),
            clause("verdict", "AUDIT", false),
        ]);
        assert_eq!(filter, want);
    }

    #[test]
    fn counts_and_times() {
        assert_eq!(query("").last, Some(LAST));
        assert_eq!(query("--port 1").last, Some(LAST));
        assert_eq!(query("-f").last, None);
        assert_eq!(query("--since 5m").last, None);
        assert_eq!(query("--since 5m").since, Some("2026-11-21T19:55:00Z".parse().unwrap()));
        assert_eq!((query("--first 3").first, query("--first 3").last), (Some(3), None));
        assert_eq!(query("-f --last 7").last, Some(7));
    }
}
