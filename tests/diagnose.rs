//! `defib diagnose` as a user types it, on the real dump of a guest that crashed in a driver, with a lock held that
//! somebody else waits for; on a migration stream of the same moment; on its console log; and on what is no dump at
//! all.

mod crashed;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Duration;

use corpus::lab::{Kernel, Vm, VmConfig};
use crashed::Crashed;
use serde_json::{Value, json};

const OFFENDER: &str = "mutex_with_waiter";
const WAITER: &str = "wait_for_mutex";

/// What a crash has left, in the folder of the build: nothing removes it at the end of the tests.
struct Made {
    folder: PathBuf,
    dump: String,
    /// What `migrate` wrote of the same moment, and the same as libvirt saves it.
    streams: [String; 2],
    log: String,
    /// `--vmlinux` and `--debug-dir`, with their values.
    knowledge: Vec<String>,
}

fn made() -> &'static Made {
    static MADE: OnceLock<Made> = OnceLock::new();
    MADE.get_or_init(|| Made::of("6.1"))
}

impl Made {
    /// Crashes a guest.
    fn of(kernel: &str) -> Self {
        let config = VmConfig::new(Kernel::find(kernel).unwrap());
        let name = format!("diagnose/{kernel}");
        let mut crashed = Crashed::of(&name, &config, "crash_locks", crashed::PAIR);
        crashed.dumped("vmcore", &json!({}));
        let Crashed { mut vm, folder, knowledge } = crashed;
        let name = |file: &str| folder.join(file).to_str().unwrap().to_owned();
        let (dump, log) = (name("vmcore"), name("console.log"));
        let streams = [name("stream"), name("saved")];
        migrate(&mut vm, &streams[0]);
        fs::write(&streams[1], saved_by_libvirt(&fs::read(&streams[0]).unwrap())).unwrap();
        fs::copy(vm.serial_log(), &log).unwrap();
        Self { folder, dump, streams, log, knowledge }
    }

    /// What is said of the dump in a format, with these arguments for knowledge.
    fn said(&self, format: &str, knowledge: &[String]) -> String {
        Self::said_of(&self.dump, format, knowledge)
    }

    fn said_of(file: &str, format: &str, knowledge: &[String]) -> String {
        let mut arguments = vec![file, "--format", format];
        arguments.extend(knowledge.iter().map(String::as_str));
        let (code, stdout, stderr) = defib(&arguments);
        assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
        stdout
    }

    fn json(&self, knowledge: &[String]) -> Value {
        serde_json::from_str(&self.said("json", knowledge)).unwrap()
    }
}

/// Writes RAM and all devices of a guest that stands, which does not go on.
fn migrate(vm: &mut Vm, file: &str) {
    let whole = json!([{ "capability": "x-ignore-shared", "state": false }]);
    let control = vm.control();
    control.command("migrate-set-capabilities", json!({ "capabilities": whole })).unwrap();
    control.command("migrate", json!({ "uri": format!("exec:cat >'{file}'") })).unwrap();
    for _ in 0..1200 {
        let state = control.command("query-migrate", json!({})).unwrap();
        match state["status"].as_str() {
            Some("completed") => return,
            Some("failed" | "cancelled") => panic!("{state}"),
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    panic!("the migration does not end");
}

/// A stream behind the header and the XML of `virsh save` (struct _virQEMUSaveHeader).
fn saved_by_libvirt(stream: &[u8]) -> Vec<u8> {
    let xml = b"<domain type='qemu'><name>guest</name></domain>\n\0";
    let mut file = b"LibvirtQemudSave".to_vec();
    // Version, length of the XML, whether it ran, format, offset of the cookie; 14 words that are not used.
    file.extend([2, xml.len() as u32, 1, 0, 0].map(u32::to_le_bytes).concat());
    file.extend([0; 14 * 4]);
    [&file, &xml[..], stream].concat()
}

fn defib(arguments: &[&str]) -> (i32, String, String) {
    command("diagnose", arguments)
}

fn command(name: &str, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_defib"));
    let Output { status, stdout, stderr } = command.arg(name).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

/// What is said of the dump in a format.
fn of_dump(format: &str) -> String {
    made().said(format, &made().knowledge)
}

#[track_caller]
fn must_hold(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in:\n{said}");
    }
}

#[test]
fn people_read_who_is_at_fault_and_who_waits() {
    let said = of_dump("text");
    assert!(said.starts_with("BUG: unable to handle kernel NULL pointer dereference in"), "{said}");
    must_hold(&said, &["The driver crash_locks is at fault", OFFENDER, "crash_locks.c:"]);
    must_hold(&said, &["Repair that would have been made", "rung 1 (return an error)"]);
    must_hold(&said, &["mutex_unlock", "why not rung 2", "own reporting, in panic"]);
    must_hold(&said, &["(vCPU 0)", "(vCPU 1)", "ledger *", "Kernel panic - not syncing"]);
    must_hold(&said, &["Blocked tasks", WAITER, "held by "]);
    let (report, _paths) = said.split_once("\nSource\n").unwrap();
    assert!(report.lines().all(|line| line.trim_end().chars().count() <= 120), "{report}");
}

#[test]
fn scripts_read_the_same_facts() {
    let answer = made().json(&made().knowledge);
    let at = |path: &str| answer.pointer(path).unwrap_or_else(|| panic!("no {path}"));
    assert_eq!((at("/schema"), at("/input/kind")), (&json!(1), &json!("dump")));
    assert_eq!(at("/diagnosis/class/kind"), "null_dereference");
    assert_eq!(at("/diagnosis/offender/module"), "crash_locks");
    assert_eq!(at("/diagnosis/offender/function"), OFFENDER);
    assert!(at("/diagnosis/offender/source/file").as_str().unwrap().ends_with("crash_locks.c"));
    // As it would have been at the hook: what panic() has added since is taken off.
    assert_eq!(at("/plan/rung"), "return_error");

    let crashed = at("/diagnosis/task/pid");
    let tasks = at("/state/tasks/known").as_array().unwrap();
    let of_crash = tasks.iter().find(|task| &task["pid"] == crashed).expect("the crashed task");
    assert!(of_crash["on_cpu"].is_number() && tasks.len() > 20, "{of_crash}");
    let cpus = at("/state/cpus").as_array().unwrap();
    assert_eq!(cpus.len(), 2);
    assert_eq!(cpus.iter().filter(|cpu| cpu["doing"] == "crashed").count(), 1);
    assert!(cpus.iter().all(|cpu| cpu.pointer("/backtrace/known/frames/0").is_some()));

    let blocked = at("/state/waiting/known/blocked").as_array().unwrap();
    let waits = |task: &&Value| {
        let frames = task.pointer("/backtrace/known/frames").and_then(Value::as_array);
        frames.is_some_and(|frames| frames.iter().any(|frame| frame["function"] == WAITER))
    };
    let waiter = blocked.iter().find(waits).expect("who waits in the driver");
    let locks = at("/state/waiting/known/locks").as_array().unwrap();
    let lock = locks.iter().find(|lock| lock["at"] == waiter["lock"]).expect("its lock");
    assert_eq!((&lock["kind"], &lock["owner"]["pid"]), (&json!("mutex"), crashed));
    assert_eq!(lock["waiters"][0]["pid"], waiter["task"]["pid"]);
    let held = at("/diagnosis/all_effects/held").as_array().unwrap();
    assert!(held.iter().any(|held| held["lock"] == lock["at"]), "the same lock by two ways");

    let variables = at("/state/variables/known").as_array().unwrap().iter();
    let mut names = variables.flat_map(|frame| frame["variables"].as_array().unwrap());
    assert!(names.any(|variable| variable["of"] == "ledger *" && variable["value"].is_string()));
    // Of the kernel's own frames, too, and of those who wait.
    let value = |variables: &Value, name: &str| {
        let mut all = variables.as_array().unwrap().iter();
        all.find(|it| it["name"] == name).and_then(|it| it["value"].as_str().map(str::to_owned))
    };
    let of_crash = at("/state/variables/known").as_array().unwrap();
    let written = of_crash.iter().find(|frame| frame["function"] == "vfs_write").expect("a frame");
    let count = "mutex-waited".len().to_string();
    assert_eq!(value(&written["variables"], "count"), Some(count), "{written}");
    assert!(value(&written["variables"], "file").is_some_and(|file| file.starts_with("0xffff")));
    let frames = waiter.pointer("/backtrace/known/frames").and_then(Value::as_array).unwrap();
    let mut sleeping = frames.iter().filter(|frame| frame["function"] == "__mutex_lock");
    let locked = sleeping.next().and_then(|frame| value(&frame["variables"], "lock"));
    assert_eq!(locked.as_deref(), waiter["lock"].as_str(), "the lock by a third way");
    let modules = at("/state/modules").as_array().unwrap();
    assert!(modules.iter().any(|it| it["name"] == "crash_locks" && it["taints"] == "OE"));
    assert!(at("/state/memory/known/total").as_u64().unwrap() > 10_000);
    assert_eq!(at("/reports/0/signature"), at("/diagnosis/signature"), "the kernel says the same");
}

/// Per-CPU places, ORC rows and the preempt count's way differ from 6.1's; without files, all comes out of the dump.
#[test]
fn a_newer_kernel_with_files_and_without() {
    let made = Made::of("6.12");
    for knowledge in [made.knowledge.as_slice(), &[]] {
        let answer = made.json(knowledge);
        let at = |path: &str| answer.pointer(path).unwrap_or_else(|| panic!("no {path}"));
        assert_eq!(at("/diagnosis/class/kind"), "null_dereference");
        assert_eq!(at("/diagnosis/offender/function"), OFFENDER);
        assert_eq!(at("/plan/rung"), "return_error", "{}", at("/plan/refused"));
        let line = at("/diagnosis/offender").pointer("/source/line");
        assert_eq!(line.is_some_and(Value::is_u64), !knowledge.is_empty());
        let locks = at("/state/waiting/known/locks").as_array().unwrap();
        let waited_for = |lock: &&Value| lock["owner"]["pid"] == *at("/diagnosis/task/pid");
        assert_eq!(locks.iter().filter(waited_for).count(), 1, "{locks:?}");
        assert!(at("/state/tasks/known").as_array().unwrap().len() > 20);
    }
}

/// Where it comes from, and all else that is said, without the registers that QEMU's notes in an ELF dump do not have.
fn facts(json: &str) -> (Value, Value) {
    let mut answer: Value = serde_json::from_str(json).unwrap();
    let input = answer.as_object_mut().unwrap().remove("input").unwrap();
    let frames = answer.pointer_mut("/diagnosis/frames").and_then(Value::as_array_mut).unwrap();
    for frame in frames {
        let registers = frame["registers"].as_object_mut().unwrap();
        registers.retain(|name, _| {
            !["efer", "star", "lstar", "cstar", "fmask"].contains(&name.as_str())
        });
    }
    (input, answer)
}

#[test]
fn a_migration_stream_tells_what_the_dump_tells() {
    let made = made();
    for knowledge in [made.knowledge.as_slice(), &[]] {
        let (_, expected) = facts(&made.said("json", knowledge));
        for (file, format) in made.streams.iter().zip(["migration stream", "libvirt save file"]) {
            let (input, answer) = facts(&Made::said_of(file, "json", knowledge));
            assert_eq!(input["format"], format!("{format}, by QEMU"));
            assert_eq!(input["ram_bytes"], 256 << 20, "{input}");
            assert_eq!(input["captured_bytes"], input["ram_bytes"]);
            assert_eq!(input["remarks"], json!(["no VMCOREINFO in its notes"]));
            // Each is megabytes of text.
            assert!(answer == expected, "{file} tells something else than {}", made.dump);
        }
    }
    let knowledge: Vec<&str> = made.knowledge.iter().map(String::as_str).collect();
    for file in &made.streams {
        let plan = [&[file.as_str()], &knowledge[..]].concat();
        let (code, said, error) = command("plan", &plan);
        assert_eq!(code, 0, "{error}");
        must_hold(&said, &[OFFENDER, "mutex_unlock", "remark: no VMCOREINFO"]);
    }
    let all = [&made.dump, &made.streams[0], &made.streams[1], &made.log].map(String::as_str);
    let (code, said, error) =
        command("triage", &[&all, &knowledge[..], &["--format", "json"]].concat());
    assert_eq!(code, 0, "{error}");
    let answer: Value = serde_json::from_str(&said).unwrap();
    let buckets = answer["buckets"].as_array().unwrap();
    assert_eq!((buckets.len(), &buckets[0]["count"]), (1, &json!(4)), "{said}");
}

#[test]
fn a_browser_needs_nothing_else() {
    let said = of_dump("html");
    must_hold(&said, &["<!DOCTYPE html>", OFFENDER, WAITER, "Refused", "Blocked tasks", "</html>"]);
    for outside in ["http://", "https://", "<script", "src=", "<link"] {
        assert!(!said.contains(outside), "{outside}");
    }
}

#[test]
fn a_log_is_marked_as_such() {
    let made = made();
    let (code, said, _) = defib(&[&made.log]);
    assert_eq!(code, 0, "{said}");
    must_hold(
        &said,
        &["From a console log only", OFFENDER, "[crash_locks]", "guilty file  unknown"],
    );
    let (_, json, _) = defib(&[&made.log, "--format", "json"]);
    let answer: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(answer.pointer("/reports/0/module"), Some(&json!("crash_locks")));
    let quiet = made.folder.join("quiet");
    fs::write(&quiet, "[    1.0] all is well\n").unwrap();
    assert_eq!(defib(&[quiet.to_str().unwrap()]).0, 1);
}

#[test]
fn what_is_no_dump_is_refused_and_damage_is_no_panic() {
    let made = made();
    let file = made.folder.join("damaged");
    let name = file.to_str().unwrap();
    let run = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        let knowledge = made.knowledge.iter().take(2).map(String::as_str);
        defib(&std::iter::once(name).chain(knowledge).collect::<Vec<_>>())
    };
    for bytes in [&b""[..], b"\x7fELF\x02\x01\x01", b"\x07\x03\xc8\x01\x05\0\0", b"QEVM\0\0\0\x03"]
    {
        let (code, said, error) = run(bytes);
        assert_eq!((code, said.as_str()), (2, ""), "{error}");
        assert!(error.starts_with("defib: cannot use") && !error.contains("panicked"), "{error}");
    }
    // The header and a half of the memory: whatever is missing is said.
    let dump = fs::read(&made.dump).unwrap();
    let (code, _, error) = run(&dump[..dump.len() / 2]);
    assert!((0..=2).contains(&code) && !error.contains("panicked"), "{code}: {error}");
    // A page of noise over every 64th one.
    let mut noisy = dump;
    for (index, page) in noisy.chunks_mut(4096).enumerate().skip(64).step_by(64) {
        page.fill(index as u8);
    }
    let (code, _, error) = run(&noisy);
    assert!((0..=2).contains(&code) && !error.contains("panicked"), "{code}: {error}");
    fs::remove_file(&file).unwrap();
}

#[test]
fn another_kernels_vmlinux_is_refused() {
    let made = made();
    let Ok(other) = Kernel::find("6.12").and_then(|kernel| kernel.needed_vmlinux()) else {
        panic!("scripts/setup installs 6.12, too");
    };
    let (code, said, error) = defib(&[&made.dump, "--vmlinux", other.to_str().unwrap()]);
    assert_eq!((code, said.as_str()), (2, ""));
    assert!(error.contains("cannot diagnose"), "{error}");
}
