//! A lab guest from the command line: start one that stays, talk to its agent, end it. For work on
//! defib itself; the corpus campaign has a command of its own.

use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use defib_corpus::Error;
use defib_corpus::Result;
use defib_corpus::lab;
use defib_corpus::lab::Agent;
use defib_corpus::lab::Backend;
use defib_corpus::lab::Kernel;
use defib_corpus::lab::Machine;
use defib_corpus::lab::Snapshot;
use defib_corpus::lab::Vm;
use defib_corpus::lab::VmConfig;
use defib_corpus::scenario;
use defib_corpus::stock;

const USAGE: &str = "\
usage: lab boot [--kernel 6.1|6.12] [--fresh] [--memory MIB] [--vcpus N] [--memfd | --anonymous]
                [--q35] [--no-slots] [--no-edu] [--oops-goes-on] [--panic SECONDS] [--reboot]
                [--cpu MODEL] [--qemu PROGRAM] [--kernel-args TEXT] [-- QEMU-ARGUMENT…]
       lab cmd RUN COMMAND…      lab stop RUN      lab drivers [--kernel 6.1|6.12]
       lab stock [--kernel 6.1|6.12] [--console] [CASE…]    crashes stock guests and reads their oops
boot prints key=value lines (run, pid, qmp, serial, ram) and leaves the guest running; it is restored
from a snapshot unless --fresh is given. RUN is the folder printed as run=.";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.first().map(String::as_str) {
        Some("boot") => boot(&words[1..]),
        Some("cmd") if words.len() > 2 => command(Path::new(&words[1]), &words[2..].join(" ")),
        Some("stop") if words.len() == 2 => lab::stop(Path::new(&words[1])).map(|()| true),
        Some("stock") => stock_cases(&words[1..]),
        Some("drivers") => drivers(&words[1..]),
        _ => Ok(false),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What an option changes.
type Change = Box<dyn Fn(&mut VmConfig)>;

/// The options of `boot`; `None` when one is unknown or lacks its value.
struct Options {
    kernel: String,
    fresh: bool,
    apply: Vec<Change>,
}

fn parse(words: &[String]) -> Option<Options> {
    let mut options = Options { kernel: "6.1".to_owned(), fresh: false, apply: Vec::new() };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let change: Change = match word.as_str() {
            "--kernel" => {
                options.kernel.clone_from(words.next()?);
                continue;
            }
            "--fresh" => {
                options.fresh = true;
                continue;
            }
            "--memory" => {
                let mib = words.next()?.parse().ok()?;
                Box::new(move |config| config.memory_mib = mib)
            }
            "--vcpus" => {
                let vcpus = words.next()?.parse().ok()?;
                Box::new(move |config| config.vcpus = vcpus)
            }
            "--panic" => {
                let seconds = words.next()?.parse().ok()?;
                Box::new(move |config| config.panic_timeout = seconds)
            }
            "--cpu" => {
                let cpu = words.next()?.clone();
                Box::new(move |config| config.cpu = Some(cpu.clone()))
            }
            "--qemu" => {
                let qemu = PathBuf::from(words.next()?);
                Box::new(move |config| config.qemu.clone_from(&qemu))
            }
            "--kernel-args" => {
                let text = words.next()?.clone();
                Box::new(move |config| config.kernel_args.clone_from(&text))
            }
            "--memfd" => Box::new(|config| config.backend = Backend::Memfd),
            "--anonymous" => Box::new(|config| config.backend = Backend::Anonymous),
            "--q35" => Box::new(|config| config.machine = Machine::Q35),
            "--no-slots" => Box::new(|config| config.slots = false),
            "--no-edu" => Box::new(|config| config.edu = false),
            "--oops-goes-on" => Box::new(|config| config.panic_on_oops = false),
            "--reboot" => Box::new(|config| config.reboot = true),
            "--" => {
                let more: Vec<String> = words.by_ref().cloned().collect();
                Box::new(move |config| config.extra_args.clone_from(&more))
            }
            _ => return None,
        };
        options.apply.push(change);
    }
    Some(options)
}

fn boot(words: &[String]) -> Result<bool> {
    let Some(options) = parse(words) else { return Ok(false) };
    let mut config = VmConfig::new(Kernel::find(&options.kernel)?);
    for change in &options.apply {
        change(&mut config);
    }
    let vm =
        if options.fresh { Vm::boot(&config)? } else { Snapshot::cached(&config)?.restore()? };
    println!("pid={}", vm.pid());
    println!("qmp={}", vm.qmp().display());
    println!("serial={}", vm.serial_log().display());
    if let Some(ram) = vm.ram_file() {
        println!("ram={}", ram.display());
    }
    if let Some(vmlinux) = config.kernel.vmlinux() {
        println!("vmlinux={}", vmlinux.display());
    }
    println!("ready_ms={}", vm.took().as_millis());
    println!("run={}", vm.leave().display());
    Ok(true)
}

fn command(run: &Path, command: &str) -> Result<bool> {
    let mut agent = Agent::connect(&run.join("agent.sock"))?;
    match agent.command(command) {
        Ok(answer) => {
            println!("{}", answer.unescaped());
            Ok(true)
        }
        Err(Error::Agent { reason, .. }) => {
            println!("err {reason}");
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

fn drivers(words: &[String]) -> Result<bool> {
    let Some(options) = parse(words) else { return Ok(false) };
    for driver in lab::drivers(&Kernel::find(&options.kernel)?)? {
        println!("{}={}", driver.name, driver.with_debug.display());
    }
    Ok(true)
}

fn stock_cases(words: &[String]) -> Result<bool> {
    let (names, options): (Vec<_>, Vec<_>) =
        words.iter().cloned().partition(|word| scenario::case(word).is_some());
    let show = options.iter().any(|word| word == "--console");
    let options: Vec<_> = options.into_iter().filter(|word| word != "--console").collect();
    let Some(options) = parse(&options) else { return Ok(false) };
    let config = stock::config(VmConfig::new(Kernel::find(&options.kernel)?));
    let snapshot = Snapshot::cached(&config)?;
    for case in scenario::cases() {
        if !names.is_empty() && !names.iter().any(|name| name == case.name) {
            continue;
        }
        match stock::crash(case, &snapshot) {
            Ok(down) => {
                let word = if down.names_offender { "as expected" } else { "ANOTHER FUNCTION" };
                println!("{:18} {word}, {} ms", case.name, down.took.as_millis());
                if show || !down.names_offender {
                    println!("{}", down.console);
                }
            }
            Err(error) => println!("{:18} FAILED: {error}", case.name),
        }
    }
    Ok(true)
}
