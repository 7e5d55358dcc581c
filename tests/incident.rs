//! The files of one incident, opened by those who are to read them: `live.core` by crash, drgn and defib's own reader,
//! `report.html` by a browser. One real crash for all of them.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use corpus::campaign::{self, Outcome, Stand};
use corpus::guarded::GuardConfig;
use corpus::lab::{Kernel, Snapshot, VmConfig, drivers};
use corpus::scenario::case;
use diagnose::dump::{self, Hints};
use guest::{Machine, Reg, Vcpu};
use serde_json::Value;

/// Three locks, two functions of the driver, a `BUG()`.
const CASE: &str = "three-locks";
/// What must be named wherever the crash is shown.
const FUNCTION: &str = "ledger_write";

/// The incident's folder, in that of the build: nothing removes it at the end of the tests.
struct Made {
    root: PathBuf,
    vmlinux: PathBuf,
    /// The driver's module with DWARF.
    driver: PathBuf,
}

impl Made {
    fn file(&self, name: &str) -> PathBuf {
        let folders = fs::read_dir(&self.root).unwrap().flatten().map(|entry| entry.path());
        let mut folders = folders.filter(|path| path.is_dir());
        let folder = folders.next().expect("an incident");
        assert!(folders.next().is_none(), "one incident");
        let file = folder.join(name);
        let found = fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.file_name());
        assert!(file.is_file(), "{name} is not among {:?}", found.collect::<Vec<_>>());
        file
    }
}

/// Crashes a guest, once.
fn incident() -> &'static Made {
    static MADE: OnceLock<Made> = OnceLock::new();
    MADE.get_or_init(|| {
        let kernel = Kernel::find("6.1").unwrap();
        let vmlinux = kernel.needed_vmlinux().unwrap();
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("incident");
        let _ = fs::remove_dir_all(&root);
        let drivers = drivers(&kernel).unwrap().into_iter();
        let mut driver = drivers.filter(|driver| driver.name == "crash_locks");
        let driver = driver.next().unwrap().with_debug;
        let program = env!("CARGO_BIN_EXE_defib");
        let guard = GuardConfig::with_debug_files(program, &kernel, &root).unwrap();
        let stand = Stand::Qemu(Snapshot::cached(&VmConfig::new(kernel)).unwrap());
        let verdict = campaign::run(case(CASE).unwrap(), &stand, &guard).unwrap();
        assert_eq!(verdict.outcome, Outcome::Saved);
        Made { root, vmlinux, driver }
    })
}

/// What a tool prints; both its streams, as the tools differ in that.
fn run(tool: &str, arguments: &[&dyn AsRef<OsStr>]) -> String {
    let mut command = Command::new("timeout");
    command.arg("120").arg(tool).args(arguments.iter().map(|word| word.as_ref()));
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{tool} (scripts/setup installs it): {said}");
    said
}

#[track_caller]
fn must_hold(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in:\n{said}");
    }
}

#[test]
fn incident_json_names_the_core() {
    let text = fs::read_to_string(incident().file("incident.json")).unwrap();
    let record: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(record.pointer("/live_core/file"), Some(&Value::from("live.core")));
}

#[test]
fn our_own_reader_opens_the_core() {
    let core = incident().file("live.core");
    let size = fs::metadata(&core).unwrap().len();
    assert!((1 << 20..40 << 20).contains(&size), "{size} bytes");
    let mut dump = dump::open(&[core], &Hints::default()).unwrap();
    assert_eq!(dump.vcpu_count(), 2);
    assert!(dump.vmcoreinfo().is_some());
    let text = |vcpu| dump.registers(Vcpu(vcpu)).unwrap().get(Reg::Rip).unwrap_or(0);
    let in_kernel = [0, 1].map(text).into_iter().filter(|rip| rip >> 40 == 0xff_ffff).count();
    assert!(in_kernel >= 1, "the crashed vCPU stood in the kernel");
}

/// Its list of tasks is not looked at: crash 8.0.2 reads `struct pid` without its `numbers`, a flexible array since commit
/// b69f0aeb0689 (v6.5, and Debian's 6.1), and finds next to none in a whole dump either.
#[test]
fn crash_opens_the_core() {
    let made = incident();
    let commands = made.root.join("commands");
    fs::write(&commands, "set scroll off\nsys\nbt\nps\nmod\nlog\nexit\n").unwrap();
    let core = made.file("live.core");
    let said = run("crash", &[&"-s", &"-i", &commands, &made.vmlinux, &core]);
    must_hold(&said, &["RELEASE: 6.1", FUNCTION, "crash_locks", "ksys_write", "Linux version"]);
}

#[test]
fn drgn_opens_the_core() {
    let made = incident();
    let said = drgn(made, LOOK);
    must_hold(&said, &[FUNCTION, "ksys_write", "do_syscall_64", "kthreadd", "Linux version"]);
}

/// What defib says of its own core: the same as the guard, and the same frames as crash and drgn.
#[test]
fn all_see_the_same_frames() {
    let made = incident();
    let core = made.file("live.core");
    let said = diagnosed(made);
    let record = fs::read_to_string(made.file("incident.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    for fact in ["/signature", "/title", "/class", "/offender", "/boundary/effects", "/all_effects"]
    {
        let of = |record: &Value| record.pointer(&format!("/diagnosis{fact}")).cloned();
        assert_eq!(of(&said), of(&record), "{fact}");
    }
    let ours = frames(&said);
    assert!(ours.len() > 8, "{ours:?}");

    let theirs = drgn(made, FRAMES);
    let theirs: Vec<_> = theirs.lines().filter_map(|line| line.strip_prefix("FRAME ")).collect();
    assert_eq!(theirs, ours.iter().map(|(pc, _)| pc.as_str()).collect::<Vec<_>>());

    let commands = made.root.join("backtrace");
    fs::write(&commands, "set scroll off\nbt\nexit\n").unwrap();
    let crash = run("crash", &[&"-s", &"-i", &commands, &made.vmlinux, &core]);
    // It begins with the caller of the function that is being entered, and shows the one that faulted by its
    // registers: `[exception RIP: under_three_locks+114]`. Now and then crash 8.0.2 adds return addresses of earlier
    // calls that are still on the stack, below the entry code; drgn never does.
    let shown = ours.iter().filter(|(_, is_call)| *is_call).map(|(pc, _)| pc);
    let found = backtrace(&crash);
    let mut rest = found.iter();
    let missing: Vec<_> = shown.filter(|at| !rest.any(|it| it == *at)).collect();
    assert!(missing.is_empty(), "{missing:?} of {ours:?} in {found:?}");
    must_hold(&crash, &["[exception RIP: under_three_locks+"]);
}

/// What defib says of the core.
fn diagnosed(made: &Made) -> Value {
    let (core, modules) = (made.file("live.core"), made.driver.parent().unwrap());
    let said = run(
        env!("CARGO_BIN_EXE_defib"),
        &[
            &"diagnose",
            &core,
            &"--vmlinux",
            &made.vmlinux,
            &"--debug-dir",
            &modules,
            &"--format",
            &"json",
        ],
    );
    serde_json::from_str(&said).unwrap()
}

/// What one of them knows of a variable.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    /// Code address and rbp of its frame.
    frame: (String, String),
    name: String,
    /// Of a structure its address; `None` when it is not known.
    value: Option<String>,
}

/// Whatever variable of the crashed stack drgn knows, defib knows, and the same of it.
#[test]
fn variables_hold_what_drgn_says() {
    let made = incident();
    let said = diagnosed(made);
    let ours = variables(&said);
    let theirs: Vec<Known> = drgn(made, VARIABLES).lines().filter_map(of_drgn).collect();
    let known = |all: &[Known]| all.iter().filter(|it| it.value.is_some()).count();
    let (of_ours, of_theirs) = (known(&ours), known(&theirs));
    println!("known: defib {of_ours} of {}, drgn {of_theirs} of {}", ours.len(), theirs.len());
    assert!(of_ours >= of_theirs && of_theirs > 10, "{theirs:?}");
    // drgn 0.0.22 gives the interrupted function the rbp of the exception's entry code.
    let same_frame = |it: &&Known| ours.iter().any(|own| own.frame == it.frame);
    let known = theirs.iter().filter(|it| it.value.is_some()).filter(same_frame);
    let missing: Vec<_> = known.filter(|it| !ours.contains(it)).collect();
    assert!(missing.is_empty(), "{missing:#?} in {ours:#?}");

    let of_crash = said.pointer("/state/variables/known").and_then(Value::as_array).unwrap();
    let has = |function: &str, name: &str, value: &str| {
        let mut frames = of_crash.iter().filter(|frame| frame["function"] == function);
        frames.any(|frame| {
            let mut own = frame["variables"].as_array().unwrap().iter();
            own.any(|it| it["name"] == name && it["of"] == value && it["value"].is_string())
        })
    };
    assert!(has("vfs_write", "file", "file *") && has("vfs_write", "count", "size_t"));
    assert!(has("ksys_write", "buf", "char *") && has("under_three_locks", "l", "ledger *"));
}

/// A line that [`VARIABLES`] prints.
fn of_drgn(line: &str) -> Option<Known> {
    let mut words = line.strip_prefix("VARIABLE ")?.split(' ').map(str::to_owned);
    let frame = (words.next()?, words.next()?);
    Some(Known { frame, name: words.next()?, value: words.next().filter(|it| it != "ABSENT") })
}

/// The variables of the frames of the crash.
fn variables(said: &Value) -> Vec<Known> {
    let cpus = said.pointer("/state/cpus").and_then(Value::as_array).unwrap();
    let crashed = cpus.iter().find(|cpu| cpu["doing"] == "crashed").unwrap();
    let places = crashed.pointer("/backtrace/known/frames").and_then(Value::as_array).unwrap();
    let frames = said.pointer("/diagnosis/frames").and_then(Value::as_array).unwrap();
    assert_eq!(places.len(), frames.len());
    let text = |of: &Value| of.as_str().map(str::to_owned);
    let mut found = Vec::new();
    for (place, frame) in places.iter().zip(frames) {
        let own = place["variables"].as_array().into_iter().flatten();
        found.extend(own.map(|variable| Known {
            frame: (text(&place["pc"]).unwrap(), text(&frame["registers"]["rbp"]).unwrap()),
            name: text(&variable["name"]).unwrap(),
            value: text(&variable["value"]).or_else(|| text(&variable["at"])),
        }));
    }
    found
}

/// Code addresses of the crash's frames, innermost first, and whether each is in a call.
fn frames(said: &Value) -> Vec<(String, bool)> {
    let frames = said.pointer("/diagnosis/frames").and_then(Value::as_array).unwrap();
    let address = |frame: &Value| {
        let call = frame.pointer("/pc/return");
        let at = call.or(frame.pointer("/pc/exact")).and_then(Value::as_str).unwrap();
        (at.to_owned(), call.is_some())
    };
    frames.iter().map(address).collect()
}

/// Those of the lines ` #1 [ffffd351403ebc78] do_trap at ffffffffb4030665` that crash's `bt` prints.
fn backtrace(said: &str) -> Vec<String> {
    let lines = said.lines().filter(|line| line.trim_start().starts_with('#'));
    let at = lines.filter_map(|line| line.split(" at ").nth(1)?.split_whitespace().next());
    at.map(|at| format!("0x{at}")).collect()
}

/// What drgn prints for a script behind [`OPEN`].
fn drgn(made: &Made, script: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, format!("{OPEN}{script}")).unwrap();
    let core = made.file("live.core");
    run("/usr/bin/python3", &[&file.path(), &core, &made.vmlinux, &made.driver])
}

/// Opens the core, with the debug information of the kernel and of the driver.
const OPEN: &str = "
import sys
import drgn
from drgn.helpers.linux import for_each_task
from drgn.helpers.linux.printk import get_dmesg
program = drgn.Program()
program.set_core_dump(sys.argv[1])
try:
    program.load_debug_info(sys.argv[2:])
except drgn.MissingDebugInfoError as error:
    print(error)  # modules that were not named
";

/// Kernel addresses of the crashed thread's frames, one for all functions inlined in one another.
const FRAMES: &str = "
for frame in program.crashed_thread().stack_trace():
    if not frame.is_inline and frame.pc >> 63:
        print('FRAME', hex(frame.pc))
";

/// Variables of the crashed thread's frames, one a line: of the inlined functions, too. Values are written as defib does.
const VARIABLES: &str = "
def told(value):
    kind = drgn.TypeKind
    of = value.type_
    while of.kind == kind.TYPEDEF:
        of = of.type
    if of.kind in (kind.STRUCT, kind.UNION, kind.ARRAY):
        return hex(value.address_) if value.address_ is not None else 'PARTS'
    number = value.value_()
    if of.kind == kind.POINTER:
        return hex(number)
    if of.kind == kind.BOOL:
        return str(bool(number)).lower()
    if of.kind == kind.ENUM:
        return next((name for name, own in of.enumerators if own == number), str(number))
    return str(number)

for frame in program.crashed_thread().stack_trace():
    if frame.pc >> 63:
        for name in frame.locals():
            try:
                value = frame[name]
                said = 'ABSENT' if value.absent_ else told(value)
            except Exception:
                said = 'ABSENT'
            if said != 'PARTS':
                print('VARIABLE', hex(frame.pc), hex(frame.registers()['rbp']), name, said)
";

/// The crashed thread's frames, all tasks, the log.
const LOOK: &str = "
print(program.crashed_thread().stack_trace())
print([task.comm.string_().decode() for task in for_each_task(program)])
print(get_dmesg(program)[:200])
";

#[test]
fn a_browser_shows_the_report() {
    let page = incident().file("report.html");
    let url = format!("file://{}", page.display());
    let flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"];
    let said = run("chromium-headless-shell", &[&flags[0], &flags[1], &flags[2], &flags[3], &url]);
    must_hold(&said, &["<svg", FUNCTION, "crash_locks.c", "rung 1", "</html>"]);
    assert!(!said.contains("http://") && !said.contains("https://"), "nothing from outside");
    let picture = page.with_file_name("page.png");
    let shot = format!("--screenshot={}", picture.display());
    run("chromium-headless-shell", &[&flags[0], &flags[1], &flags[2], &shot, &url]);
    assert!(is_picture(&picture), "the browser has painted it");
}

/// A PNG file that is not of one colour, as its size tells.
fn is_picture(file: &Path) -> bool {
    let bytes = fs::read(file).unwrap_or_default();
    bytes.starts_with(b"\x89PNG") && bytes.len() > 10_000
}
