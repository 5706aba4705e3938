//! What a new connection would meet, and why: the agent's own decision, run in memory.
//!
//! Objects from files become maps by the code that `run` uses, or the maps of a running agent are read; `decide`, which the
//! kernel runs, then answers. Nothing here knows a policy.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Write},
    path::Path,
};

use anyhow::{Context, anyhow, bail};

pub use self::{
    answer::{Answer, Endpoint, Frontend, Source, Verdict},
    args::{ExplainArgs, Output},
    question::Question,
};
use self::{live::Live, names::Names, world::World};
use crate::{
    cluster::{DetectLocal, Options},
    config::METRICS_PORT,
    manifests,
    objects::{Change, Objects},
    problem::ProblemKind,
};

mod answer;
mod args;
mod decision;
mod dump;
mod live;
mod names;
mod question;
mod tables;
#[cfg(test)]
mod tests;
mod world;

/// Who answers.
enum Respondent {
    /// The maps that the objects of the files make.
    World(Box<World>),
    /// The maps of the agent that runs here.
    Live(Box<Live>),
}

impl Respondent {
    fn ask(&self, question: &Question) -> Answer {
        match self {
            Self::World(world) => world.ask(question),
            Self::Live(live) => live.ask(question),
        }
    }

    fn dump(&self) -> String {
        match self {
            Self::World(world) => world.dump(),
            Self::Live(live) => live.dump(),
        }
    }
}

/// Answers what the flags ask, on the standard output; false when a line of a batch has no answer. Ends when nobody reads
/// the output any more, as behind `| head`.
///
/// # Errors
/// When the flags contradict each other, files or maps cannot be read, or the output cannot be written.
pub fn run(args: &ExplainArgs) -> anyhow::Result<bool> {
    unless_closed(answer_to(args, &mut io::stdout().lock()))
}

/// A closed output is the reader's wish, and no error.
fn unless_closed(result: anyhow::Result<bool>) -> anyhow::Result<bool> {
    let is_closed = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    match result {
        Err(error) if error.downcast_ref().is_some_and(is_closed) => Ok(true),
        result => result,
    }
}

fn answer_to(args: &ExplainArgs, out: &mut impl Write) -> anyhow::Result<bool> {
    let options = args.cluster.options()?;
    is_answerable(&options)?;
    let mut world = World::new(options);
    read(args, &mut world)?;
    let respondent = if args.live {
        Respondent::Live(Box::new(Live::open(&args.pin_dir, world, names_of_agent(args))?))
    } else {
        Respondent::World(Box::new(world))
    };
    if args.maps {
        write!(out, "{}", respondent.dump())?;
        return Ok(true);
    }
    if let Some(file) = &args.batch {
        let is_input = file == Path::new("-");
        return if is_input {
            answer_all(io::stdin().lock(), &respondent, out)
        } else {
            answer_file(file, &respondent, out)
        };
    }
    let (Some(from), Some(to)) = (args.from, args.to) else {
        bail!("give --from and --to, or --batch");
    };
    let question = Question::new(from, to, args.proto).map_err(|message| anyhow!(message))?;
    let answer = respondent.ask(&question);
    match args.output {
        Output::Text => write!(out, "{answer}")?,
        Output::Json => writeln!(out, "{}", serde_json::to_string(&answer)?)?,
    }
    Ok(true)
}

/// Names for the numbers in the agent's maps; where it does not answer, numbers do, or names of `--services`.
fn names_of_agent(args: &ExplainArgs) -> Names {
    let Some(address) = args.metrics_bind_address.with_port(METRICS_PORT) else { return Names::default() };
    names::ask(address, &args.pin_dir).unwrap_or_else(|error| {
        if args.services.is_empty() {
            eprintln!(
                "xdp-agent: the agent tells no names on {address} ({error:#}), so that Services are numbers; give \
                 --metrics-bind-address as it has it, or --services"
            );
        }
        Names::default()
    })
}

/// Whether an address alone tells who a client is.
fn is_answerable(options: &Options) -> anyhow::Result<()> {
    match options.detect_local {
        DetectLocal::None | DetectLocal::ClusterCidr(_) | DetectLocal::NodeCidr => Ok(()),
        DetectLocal::BridgeInterface(_) | DetectLocal::InterfaceNamePrefix(_) => {
            bail!("a question names no interface to tell pods by; give their networks by --cluster-cidr")
        }
    }
}

/// Reads the objects and says what is wrong with them.
fn read(args: &ExplainArgs, world: &mut World) -> anyhow::Result<()> {
    let snapshot = manifests::read(&args.services, None);
    world.apply(changes(&snapshot.objects));
    for problem in snapshot.problems.iter().chain(&world.problems()) {
        eprintln!("xdp-agent: {problem}");
    }
    if snapshot.problems.iter().any(|problem| problem.kind == ProblemKind::Unreadable) {
        bail!("not all of --services can be read");
    }
    if !args.live && !world.has_address() {
        eprintln!(
            "xdp-agent: no address of the node is known, so that it serves no NodePorts; give --node-ip or its Node object"
        );
    }
    Ok(())
}

fn answer_file(file: &Path, respondent: &Respondent, out: &mut impl Write) -> anyhow::Result<bool> {
    let questions = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    answer_all(BufReader::new(questions), respondent, out)
}

/// Answers question by question; false when a line has no answer.
fn answer_all(
    questions: impl BufRead,
    respondent: &Respondent,
    out: &mut impl Write,
) -> anyhow::Result<bool> {
    let mut is_sound = true;
    for line in questions.split(b'\n') {
        let line = line.context("cannot read the questions")?;
        let question = Question::from_json(&String::from_utf8_lossy(&line));
        match question.map(|question| respondent.ask(&question)) {
            Ok(answer) => serde_json::to_writer(&mut *out, &answer).map_err(io::Error::from)?,
            Err(error) => {
                is_sound = false;
                let answer = serde_json::json!({ "error": error });
                serde_json::to_writer(&mut *out, &answer).map_err(io::Error::from)?;
            }
        }
        // Whoever asks line by line waits for the answer.
        writeln!(out)?;
        out.flush()?;
    }
    Ok(is_sound)
}

/// Every object as a change from nothing.
fn changes(objects: &Objects) -> Vec<Change> {
    let services =
        objects.services.iter().map(|(name, object)| Change::Service(name.clone(), Some(object.clone())));
    let slices =
        objects.slices.iter().map(|(name, object)| Change::Slice(name.clone(), Some(object.clone())));
    let nodes = objects.nodes.iter().map(|(name, object)| Change::Node(name.clone(), Some(object.clone())));
    let cidrs = objects
        .service_cidrs
        .iter()
        .map(|(name, object)| Change::ServiceCidr(name.clone(), Some(object.clone())));
    services.chain(slices).chain(nodes).chain(cidrs).collect()
}
