//! The command line: what was typed becomes a call, what comes back becomes text. Only `print` prints.
//!
//! Exit codes: 0 yes or done, 1 no (the answer is deny, a check of this machine failed), 2 wrong usage or input (also a
//! policy with errors), 3 the system could not do it.

mod change;
mod engine;
mod filter;
mod pages;
mod print;
mod redact;
mod replace;
mod show;
mod support;
mod uninstall;

use crate::config::{self, Config, Settings};
use crate::control::report::{EndSpec, Outcome, PolicyCheck, Question, Service, Severity};
use crate::control::{Client, ClientError, Failure, FailureKind, Request, Response};
use crate::flow::record::Item;
use crate::flow::render::{Format, Renderer};
use clap::{Args, Parser, Subcommand, ValueEnum};
use filter::QueryArgs;
use jiff::Timestamp;
use segfw_common::Verdict;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Yes, or done.
    Yes = 0,
    /// No: the answer is deny, a check failed.
    No = 1,
    /// Wrong usage or input.
    Usage = 2,
    /// The system could not do it.
    System = 3,
}

/// Why a command could not do what it was asked.
#[derive(Debug)]
pub struct CliError {
    exit: Exit,
    message: String,
}

impl CliError {
    fn usage(message: impl ToString) -> Self {
        Self { exit: Exit::Usage, message: message.to_string() }
    }
    fn system(message: impl ToString) -> Self {
        Self { exit: Exit::System, message: message.to_string() }
    }
}
impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let input = matches!(&error, ClientError::Failed(Failure { kind: FailureKind::Input, .. }));
        if input { Self::usage(error) } else { Self::system(error) }
    }
}
impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        Self::system(error)
    }
}

/// Host microsegmentation firewall: YAML in, eBPF verdicts out.
#[derive(Debug, Parser)]
#[command(name = "segfw", version, max_term_width = 100, after_help = TOP_EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// The agent's control socket
    #[arg(long, global = true, value_name = "PATH", default_value = crate::control::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Colour: in a terminal, always or never (NO_COLOR is honoured)
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    color: Color,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

const TOP_EXAMPLES: &str = "\
Examples:
  segfw status                                         is this host protected, and by what?
  segfw flows -f --verdict DENIED                      what is refused right now?
  segfw policy check /etc/segfw/policies               is the policy right?
  segfw policy apply ./my-policy                       put it in force, whole or not at all
  segfw policy rollback                                and back
  segfw policy explain app=web app=db tcp/5432         may web talk to db, and why?

Exit codes: 0 yes or done, 1 no, 2 wrong usage or input, 3 the system could not do it.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Enforce a policy on this host (runs until it is stopped; what it loaded stays in force)
    #[command(after_help = "\
Examples:
  segfw agent --policy /etc/segfw/policies
  segfw agent --policy ./policies --monitor            judge and record, drop nothing
  segfw agent --policy ./policies --host-label zone=eu-1 --xdp eth0")]
    Agent(AgentArgs),
    /// Put the last good revision in force without an agent, at boot (what segfw-early.service does)
    #[command(after_help = "\
Examples:
  segfw load
  segfw load --state-dir /var/lib/segfw --cgroup-root /sys/fs/cgroup/unified

Loads what was in force last from the state folder, attaches it, pins it, and ends. The policy folder is not read.
Where something is in force already nothing is changed.")]
    Load(LoadArgs),
    /// What is enforced, since when, by which revision, and what is wrong
    #[command(after_help = "\
Examples:
  segfw status
  segfw status -o json | jq .revision.number

Exit code 1: the state is DEGRADED or OPEN. 3: no agent answers; then it says what the kernel enforces on its own.")]
    Status(StatusArgs),
    /// The workloads of this host and how each is treated
    #[command(after_help = "\
Examples:
  segfw workloads
  segfw workloads -o json | jq 'select(.enforcement == \"no-segment\") | .cgroup'")]
    Workloads(OutputArgs),
    /// Recorded and live flows, with filters as in `hubble observe`
    #[command(after_help = filter::EXAMPLES)]
    Flows(FlowArgs),
    /// Work with policies
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Whether this machine can run segfw, and what is missing
    #[command(after_help = "\
Examples:
  sudo segfw doctor
  segfw doctor -o json")]
    Doctor(OutputArgs),
    /// One file for whoever is to help: status, policies, flows, host; without secrets
    #[command(after_help = "\
Examples:
  segfw support
  segfw support /tmp/segfw.tar.gz

It is written with mode 0600, and also where no agent answers. Addresses, names and labels are in it.")]
    Support(support::SupportArgs),
    /// Before segfw is removed: what becomes of what is enforced
    #[command(after_help = "\
Examples:
  segfw uninstall                                      asks
  segfw uninstall --keep --yes                         enforced until the next boot
  segfw uninstall --open --yes                         nothing is enforced any more (stop the agent first)
  segfw uninstall --open --purge --yes                 and the state is removed

Without a terminal it needs --yes, or onRemove in the settings.")]
    Uninstall(uninstall::UninstallArgs),
    /// A script that completes this command line in your shell
    #[command(after_help = "\
Examples:
  segfw completions bash > /etc/bash_completion.d/segfw
  segfw completions zsh > /usr/local/share/zsh/site-functions/_segfw
  segfw completions fish > ~/.config/fish/completions/segfw.fish")]
    Completions(pages::CompletionArgs),
    /// Manual pages, one for each verb
    #[command(
        hide = true,
        after_help = "\
Examples:
  segfw man /usr/local/share/man/man1"
    )]
    Man(pages::ManArgs),
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Read, resolve and compile policies; all problems at once. Changes nothing, needs no agent
    #[command(after_help = "\
Examples:
  segfw policy check /etc/segfw/policies
  segfw policy check --strict base/ team-a/            warnings are errors
  segfw policy check -o json policies/ | jq '.findings[]'

Exit code 2: there are errors.")]
    Check(CheckArgs),
    /// May FROM open a connection to TO, and which rule says so?
    #[command(after_help = "\
FROM and TO: labels (app=web,tier=api), a workload, a cgroup path, an address, world, host, unresolved.
PORT: tcp/5432, udp/53, icmp/8, sctp/3868.

Examples:
  segfw policy explain app=web app=payments,tier=db tcp/5432
  segfw policy explain world postgresql.service tcp/5432
  segfw policy explain 10.0.0.5 /system.slice/nginx.service tcp/443
  segfw policy explain --policy policies/ app=web app=db tcp/5432      without an agent

Exit code 0: allowed, 1: denied.")]
    Explain(ExplainArgs),
    /// Run the Test documents of policies: is each connection answered as they say? Needs no agent
    #[command(after_help = "\
Examples:
  segfw policy test /etc/segfw/policies
  segfw policy test -o json policies/ | jq 'select(.held != \"yes\")'

Exit code 1: a case fails, or cannot be asked. The agent refuses such a revision.")]
    Test(change::TestArgs),
    /// Put policies in force on this host: checked, shown, taken whole or refused whole
    #[command(after_help = "\
Examples:
  segfw policy apply ./my-policy --dry-run             what would change?
  segfw policy apply ./my-policy                       asks on a terminal
  segfw policy apply --yes base/ team-a/               together they are the policy

The files replace those in the agent's policy folder in one step; other files there stay. What the agent refuses is put
back. Exit code 0: in force. 1: refused, or a test fails. 2: the policy has errors.")]
    Apply(change::ApplyArgs),
    /// Put an earlier revision back in force
    #[command(after_help = "\
Examples:
  segfw policy rollback                                the one before; twice is back again
  segfw policy rollback 41 --dry-run                   what would change?
  segfw policy rollback 41 --yes

Exit code 0: in force. 1: refused.")]
    Rollback(change::RollbackArgs),
    /// The revisions that were in force here, newest first
    #[command(after_help = "\
Examples:
  segfw policy history
  segfw policy history -o json | jq 'select(.in_force).number'")]
    History(OutputArgs),
    /// What differs: documents, rules, table entries
    #[command(after_help = "\
Examples:
  segfw policy diff                                    the one before and what is in force
  segfw policy diff ./my-policy                        what is in force and this folder
  segfw policy diff 41                                 revision 41 and what is in force
  segfw policy diff 41 ./my-policy

Exit code 1: there are differences.")]
    Diff(change::DiffArgs),
    /// The language as a JSON Schema, for editors
    #[command(after_help = "\
Examples:
  segfw policy schema > segfw-schema.json
  segfw policy schema --markdown > docs/policy-reference.md

In VS Code with the YAML extension: \"yaml.schemas\": {\"./segfw-schema.json\": \"policies/*.yaml\"}")]
    Schema(pages::SchemaArgs),
}

#[derive(Debug, Default, Args)]
struct AgentArgs {
    /// Settings; the command line wins over them [default: /etc/segfw/agent.yaml if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The folder with the policy (read recursively)
    #[arg(long, value_name = "DIR")]
    policy: Option<PathBuf>,
    /// Judge and record everything, drop nothing
    #[arg(long)]
    monitor: bool,
    /// Where programs and maps are pinned [default: /sys/fs/bpf/segfw]
    #[arg(long, value_name = "PATH")]
    pin_dir: Option<PathBuf>,
    /// What must survive a restart [default: /var/lib/segfw]
    #[arg(long, value_name = "PATH")]
    state_dir: Option<PathBuf>,
    /// Mount point of the cgroup2 hierarchy [default: the first in /proc/self/mountinfo]
    #[arg(long, value_name = "PATH")]
    cgroup_root: Option<PathBuf>,
    /// A label for all workloads of this host; may be repeated
    #[arg(long = "host-label", value_name = "KEY=VALUE")]
    host_labels: Vec<String>,
    /// A network interface that gets the outer wall; may be repeated
    #[arg(long, value_name = "IFACE")]
    xdp: Vec<String>,
    /// Which gate judges inbound TCP [default: auto]
    #[arg(long, value_enum, value_name = "GATE")]
    gate: Option<config::GateChoice>,
    /// Serve /metrics, /healthz and /readyz here, as 127.0.0.1:9477
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<std::net::SocketAddr>,
}

#[derive(Debug, Args)]
struct LoadArgs {
    /// Settings; the command line wins over them [default: /etc/segfw/agent.yaml if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where programs and maps are pinned [default: /sys/fs/bpf/segfw]
    #[arg(long, value_name = "PATH")]
    pin_dir: Option<PathBuf>,
    /// Where the last good revision was saved [default: /var/lib/segfw]
    #[arg(long, value_name = "PATH")]
    state_dir: Option<PathBuf>,
    /// Mount point of the cgroup2 hierarchy [default: the first in /proc/self/mountinfo]
    #[arg(long, value_name = "PATH")]
    cgroup_root: Option<PathBuf>,
}

impl From<LoadArgs> for AgentArgs {
    fn from(LoadArgs { config, pin_dir, state_dir, cgroup_root }: LoadArgs) -> Self {
        Self { config, pin_dir, state_dir, cgroup_root, ..Self::default() }
    }
}

impl AgentArgs {
    /// What was typed, settled, for an agent: there is a folder with a policy.
    fn settle(self, socket: PathBuf) -> Result<Config, CliError> {
        let config = self.settle_host(socket)?;
        if config.policy.as_os_str().is_empty() {
            return Err(CliError::usage("no policy folder: give --policy DIR, or policy: in the settings"));
        }
        if !config.policy.is_dir() {
            return Err(CliError::usage(format!("--policy {}: no such folder", config.policy.display())));
        }
        Ok(config)
    }

    /// What was typed, settled, whether there is a policy folder (else the path is empty) or not.
    fn settle_host(self, socket: PathBuf) -> Result<Config, CliError> {
        let Self { config, policy, monitor, pin_dir, state_dir, cgroup_root, host_labels, xdp, gate, metrics } = self;
        let settings = match config {
            Some(path) => Settings::read(&path).map_err(CliError::usage)?,
            None if Path::new(config::DEFAULT_SETTINGS).exists() => {
                Settings::read(Path::new(config::DEFAULT_SETTINGS)).map_err(CliError::usage)?
            }
            None => Settings::default(),
        };
        let cgroup_root = match cgroup_root.or(settings.cgroup_root) {
            Some(path) => path,
            None => {
                config::cgroup2_root(&std::fs::read_to_string("/proc/self/mountinfo")?).map_err(CliError::system)?
            }
        };
        let host = match settings.host {
            Some(host) => host,
            None => std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned(),
        };
        let mut labels: Vec<String> = Vec::new();
        let typed = config::host_labels(&host_labels).map_err(CliError::usage)?;
        for (key, value) in settings.host_labels.iter().filter(|(key, _)| !typed.contains_key(*key)) {
            labels.push(format!("{key}={value}"));
        }
        labels.extend(host_labels);
        let host_labels = config::host_labels(&labels).map_err(CliError::usage)?;
        Ok(Config {
            policy: policy.or(settings.policy).unwrap_or_default(),
            monitor: monitor || settings.monitor,
            pin_dir: pin_dir.or(settings.pin_dir).unwrap_or_else(|| config::DEFAULT_PIN_DIR.into()),
            state_dir: state_dir.or(settings.state_dir).unwrap_or_else(|| config::DEFAULT_STATE_DIR.into()),
            socket,
            cgroup_root,
            host_labels,
            xdp: if xdp.is_empty() { settings.xdp } else { xdp },
            gate: gate.unwrap_or(settings.gate),
            host,
            absence: settings.absence,
            metrics: metrics.or(settings.metrics.listen),
            spool: settings.flows.spool,
            runtimes: settings.runtimes,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For reading
    #[value(alias = "text")]
    Table,
    /// For programs
    Json,
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// Output format
    #[arg(short, long, default_value = "table")]
    output: Output,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    output: OutputArgs,
    /// Where to look if no agent answers [default: the settings', or /sys/fs/bpf/segfw]
    #[arg(long, value_name = "PATH")]
    pin_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct FlowArgs {
    #[command(flatten)]
    query: QueryArgs,
    /// Output format
    #[arg(short, long, default_value = "compact")]
    output: Format,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// Folders with policies; together they are one policy
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Warnings are errors
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct ExplainArgs {
    /// Who opens the connection
    from: EndSpec,
    /// Who is to answer
    to: EndSpec,
    /// The service, as tcp/5432
    port: Service,
    /// Ask the policy in this folder instead of the agent
    #[arg(long, value_name = "DIR")]
    policy: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// The whole program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.color {
        Color::Auto => {}
        Color::Always => anstream::ColorChoice::Always.write_global(),
        Color::Never => anstream::ColorChoice::Never.write_global(),
    }
    let exit = match run(cli) {
        Ok(exit) => exit,
        Err(error) => {
            print::error(&error.message);
            error.exit
        }
    };
    ExitCode::from(exit as u8)
}

fn run(cli: Cli) -> Result<Exit, CliError> {
    let Cli { command, socket, color: _ } = cli;
    match command {
        Command::Agent(args) => {
            let config = args.settle(socket)?;
            runtime(true)?.block_on(engine::agent(config)).map(|()| Exit::Yes)
        }
        Command::Load(args) => load(args.into(), socket),
        Command::Policy(PolicyCommand::Check(args)) => check(&args),
        Command::Policy(PolicyCommand::Test(args)) => change::test(&args),
        Command::Policy(PolicyCommand::Schema(args)) => pages::schema(&args),
        Command::Policy(PolicyCommand::Apply(args)) => runtime(false)?.block_on(change::apply(&socket, args)),
        Command::Policy(PolicyCommand::Rollback(args)) => runtime(false)?.block_on(change::rollback(&socket, args)),
        Command::Policy(PolicyCommand::History(args)) => {
            runtime(false)?.block_on(change::history(&socket, args.output))
        }
        Command::Policy(PolicyCommand::Diff(args)) => runtime(false)?.block_on(change::diff(&socket, args)),
        Command::Support(args) => runtime(false)?.block_on(support::support(&socket, args)),
        Command::Uninstall(args) => runtime(false)?.block_on(uninstall::uninstall(&socket, args)),
        Command::Completions(args) => pages::completions(&args),
        Command::Man(args) => pages::man(&args),
        Command::Doctor(args) => doctor(args.output),
        Command::Policy(PolicyCommand::Explain(ExplainArgs { from, to, port, policy, output })) => {
            let question = Question { from, to, port };
            let explanation = match policy {
                Some(dir) => engine::explain_offline(&dir, question)?,
                None => {
                    let answer = runtime(false)?.block_on(ask(&socket, Request::Explain(question)))?;
                    let Response::Explanation(explanation) = answer else { return Err(another_question()) };
                    explanation
                }
            };
            print::out(&match output.output {
                Output::Json => print::json(&explanation)?,
                Output::Table => show::explanation(&explanation),
            })?;
            Ok(if explanation.verdict == Verdict::Denied.into() { Exit::No } else { Exit::Yes })
        }
        Command::Status(StatusArgs { output: args, pin_dir }) => {
            let answer = match runtime(false)?.block_on(ask(&socket, Request::Status)) {
                Ok(answer) => answer,
                // The kernel goes on without an agent: that is what somebody who asks now wants to know.
                Err(error) if error.exit == Exit::System => return unattended(&error, pin_dir, args.output),
                Err(error) => return Err(error),
            };
            let Response::Status(status) = answer else { return Err(another_question()) };
            print::out(&match args.output {
                Output::Json => print::json(&status)?,
                Output::Table => show::status(&status),
            })?;
            Ok(show::status_exit(&status))
        }
        Command::Workloads(args) => runtime(false)?.block_on(workloads(&socket, args.output)),
        Command::Flows(args) => runtime(false)?.block_on(flows(&socket, args)),
    }
}

/// `segfw status` where no agent answers: what the kernel holds. The exit code is that of the question that failed.
fn unattended(error: &CliError, pin_dir: Option<PathBuf>, output: Output) -> Result<Exit, CliError> {
    let settings = Settings::read(Path::new(config::DEFAULT_SETTINGS)).unwrap_or_default();
    let pins = pin_dir.or(settings.pin_dir).unwrap_or_else(|| config::DEFAULT_PIN_DIR.into());
    let left = engine::left(&pins);
    print::out(&match output {
        Output::Json => print::json(&serde_json::json!({
            "state": "UNATTENDED",
            "why": error.message,
            "pin_dir": pins,
            "kernel": left.as_ref().ok(),
        }))?,
        Output::Table => show::unattended(&pins, &left),
    })?;
    print::error(&error.message);
    Ok(error.exit)
}

/// The agent gets all threads, a question needs one.
/// Threads of the agent's event loop: the drain of events and everything else. tokio's own choice is one per CPU.
const WORKERS: usize = 2;

fn runtime(many: bool) -> Result<tokio::runtime::Runtime, CliError> {
    let mut builder = match many {
        true => tokio::runtime::Builder::new_multi_thread(),
        false => tokio::runtime::Builder::new_current_thread(),
    };
    let _ = builder.worker_threads(WORKERS);
    Ok(builder.enable_all().build()?)
}

async fn ask(socket: &Path, request: Request) -> Result<Response, CliError> {
    Ok(Client::connect(socket).await?.ask_one(request).await?)
}

fn another_question() -> CliError {
    CliError::system("the agent answered another question; are CLI and agent of the same version?")
}

async fn workloads(socket: &Path, output: Output) -> Result<Exit, CliError> {
    let mut answer = Client::connect(socket).await?.ask(Request::Workloads).await?;
    let mut all = Vec::new();
    while let Some(response) = answer.next().await? {
        let Response::Workload(workload) = response else { return Err(another_question()) };
        all.push(workload);
    }
    let text = match output {
        Output::Json => all.iter().map(print::json_line).collect::<Result<String, _>>()?,
        Output::Table => show::workloads(&all),
    };
    print::out(&text)?;
    Ok(Exit::Yes)
}

/// Records that `segfw flows` holds at a time: some 10 MB. A longer table is aligned over so many lines.
const SHOWN_TOGETHER: usize = 1 << 13;

async fn flows(socket: &Path, args: FlowArgs) -> Result<Exit, CliError> {
    let FlowArgs { query, output } = args;
    let query = query.settle(Timestamp::now()).map_err(CliError::usage)?;
    let follow = query.follow;
    let mut answer = Client::connect(socket).await?.ask(Request::Flows(query)).await?;
    let mut renderer = Renderer::new(output);
    let mut batch: Vec<Item> = Vec::new();
    let mut shown = false;
    loop {
        let done = match answer.next().await {
            Ok(Some(Response::Flow(item))) => {
                batch.push(item);
                None
            }
            Ok(Some(_)) => return Err(another_question()),
            Ok(None) => Some(Ok(Exit::Yes)),
            Err(error) => Some(Err(error.into())),
        };
        // A stream is shown as it comes; else all at once, so that a table is aligned, as far as memory should go.
        if done.is_some() || batch.len() >= SHOWN_TOGETHER || (follow && !answer.has_more()) {
            if !batch.is_empty() || !shown {
                print::out(&renderer.items(&batch))?;
                shown = true;
            }
            batch.clear();
        }
        // What came is shown even where the end did not.
        if let Some(done) = done {
            return done;
        }
    }
}

fn load(args: AgentArgs, socket: PathBuf) -> Result<Exit, CliError> {
    let config = args.settle_host(socket)?;
    let state = config.state_dir.display().to_string();
    let early = engine::load(config)?;
    print::out(&show::early(&early, &state))?;
    Ok(Exit::Yes)
}

fn check(args: &CheckArgs) -> Result<Exit, CliError> {
    let mut check: PolicyCheck = engine::check(&args.dirs)?;
    if args.strict {
        check.findings.iter_mut().for_each(|f| f.severity = Severity::Error);
    }
    print::out(&match args.output.output {
        Output::Json => print::json(&check)?,
        Output::Table => show::check(&check),
    })?;
    Ok(if check.findings.iter().any(|f| f.severity == Severity::Error) { Exit::Usage } else { Exit::Yes })
}

fn doctor(output: Output) -> Result<Exit, CliError> {
    let checks = engine::doctor()?;
    print::out(&match output {
        Output::Json => checks.iter().map(print::json_line).collect::<Result<String, _>>()?,
        Output::Table => show::doctor(&checks),
    })?;
    Ok(if checks.iter().any(|c| c.outcome == Outcome::Bad) { Exit::No } else { Exit::Yes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(["segfw"].into_iter().chain(line.split_whitespace()))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples() {
        fn walk(command: &clap::Command) {
            if command.has_subcommands() {
                command.get_subcommands().filter(|c| c.get_name() != "help").for_each(walk);
            } else {
                let help = command.get_after_help().unwrap_or_else(|| panic!("{}", command.get_name())).to_string();
                assert!(help.contains("Examples:\n  "), "{}", command.get_name());
            }
        }
        walk(&Cli::command());
    }

    #[test]
    fn examples_in_help_are_understood() {
        let mut all = vec![TOP_EXAMPLES.to_owned()];
        fn walk(command: &clap::Command, all: &mut Vec<String>) {
            all.extend(command.get_after_help().map(ToString::to_string));
            command.get_subcommands().for_each(|c| walk(c, all));
        }
        walk(&Cli::command(), &mut all);
        let mut tried = 0;
        for line in all.iter().flat_map(|help| help.lines()) {
            let Some(line) = line.trim().trim_start_matches("sudo ").strip_prefix("segfw ") else { continue };
            let line = line.split(" | ").next().unwrap().split(" > ").next().unwrap().split("    ").next().unwrap();
            let _ = parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
            tried += 1;
        }
        assert!(tried > 20, "{tried}");
    }

    #[test]
    fn wrong_usage_says_what_is_wrong() {
        for (line, want) in [
            ("flows --verdict NO", "\"NO\" is not a verdict"),
            ("flows --verdikt DENIED", "a similar argument exists: '--verdict'"),
            ("flows --not", "--not stands in front of a filter"),
            ("flows --since yesterday", "is not a time"),
            ("flows --first 1 --last 1", "cannot be used with"),
            ("policy explain app=web app= tcp/5432", "is not an end of a flow"),
            ("policy explain app=web app=db 5432", "is not a protocol and port"),
            ("policy check", "<DIR>..."),
            ("agent --metrics 9477", "invalid socket address"),
        ] {
            let error = match parse(line) {
                Err(error) => error.to_string(),
                Ok(Cli { command: Command::Flows(flows), .. }) => {
                    flows.query.settle(Timestamp::UNIX_EPOCH).unwrap_err().to_string()
                }
                Ok(_) => panic!("{line} is understood"),
            };
            assert!(error.contains(want), "{line}: {error}");
        }
    }

    #[test]
    fn the_agents_arguments_are_settled() {
        let dir = tempfile::tempdir().unwrap();
        let line = format!(
            "agent --policy {} --host-label zone=a --xdp eth0 --cgroup-root /c --socket /s",
            dir.path().display()
        );
        let Command::Agent(args) = parse(&line).unwrap().command else { panic!("not agent") };
        let config = args.settle("/s".into()).unwrap();
        let mut want = Config::new(dir.path(), "/c".into(), config.host.clone());
        want.socket = "/s".into();
        want.xdp = vec!["eth0".to_owned()];
        want.host_labels = config::host_labels(&["zone=a".to_owned()]).unwrap();
        assert_eq!(config, want);
        let Command::Agent(args) = parse("agent --policy /does/not/exist --cgroup-root /c").unwrap().command else {
            panic!()
        };
        assert_eq!(args.settle("/s".into()).unwrap_err().exit, Exit::Usage);
    }
}
