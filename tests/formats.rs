//! One crash in every form that a dump comes in: QEMU's, makedumpfile's, the bare memory. What `defib diagnose` says of
//! them must be the same, but for what a form does not hold.

mod crashed;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use corpus::lab::{Kernel, VmConfig};
use crashed::Crashed;
use serde_json::{Value, json};

/// What every form must tell alike.
const FACTS: [&str; 6] =
    ["/diagnosis", "/plan/rung", "/state/cpus", "/state/waiting", "/state/tasks", "/state/log"];
/// ELF64: bytes of the file header and of a program header.
const EHDR: usize = 64;
const PHDR: usize = 56;

/// Exit code and answer of `defib diagnose --format json`.
fn diagnosed(files: &[PathBuf], knowledge: &[String]) -> (i32, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_defib"));
    command.arg("diagnose").args(files).args(["--format", "json"]).args(knowledge);
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(error, "", "{files:?}");
    (output.status.code().unwrap_or(-1), serde_json::from_slice(&output.stdout).unwrap())
}

/// The answer, where there is a crash.
fn told(files: &[PathBuf], knowledge: &[String]) -> Value {
    let (code, said) = diagnosed(files, knowledge);
    assert_eq!(code, 0, "{files:?}");
    said
}

fn lab(kernel: &str) -> VmConfig {
    VmConfig::new(Kernel::find(kernel).unwrap())
}

/// A crash, its ELF dump by QEMU with what is said of that, and its memory in other forms.
struct Reference {
    folder: PathBuf,
    knowledge: Vec<String>,
    elf: PathBuf,
    said: Value,
    paged: PathBuf,
    zlib: PathBuf,
    ram: PathBuf,
}

fn reference() -> &'static Reference {
    static MADE: OnceLock<Reference> = OnceLock::new();
    MADE.get_or_init(|| {
        let mut crashed =
            Crashed::of("formats/reference", &lab("6.1"), "crash_locks", crashed::PAIR);
        let elf = crashed.dumped("vmcore", &json!({}));
        let paged = crashed.dumped("paged", &json!({ "paging": true }));
        let zlib = crashed.dumped("zlib", &json!({ "format": "kdump-zlib" }));
        let ram = crashed.folder.join("ram");
        fs::copy(crashed.vm.ram_file().unwrap(), &ram).unwrap();
        let said = told(std::slice::from_ref(&elf), &crashed.knowledge);
        assert_eq!(said.pointer("/diagnosis/offender/function"), Some(&json!("mutex_with_waiter")));
        Reference {
            folder: crashed.folder,
            knowledge: crashed.knowledge,
            elf,
            said,
            paged,
            zlib,
            ram,
        }
    })
}

/// A dump of the crash must tell all facts as the reference does.
fn must_agree(files: &[PathBuf], format: &str) {
    let said = told(files, &reference().knowledge);
    for fact in FACTS {
        let (found, expected) = (said.pointer(fact), reference().said.pointer(fact));
        assert!(found.is_some() && found == expected, "{fact} of {files:?} differs");
    }
    let form = said.pointer("/input/format").and_then(Value::as_str).unwrap_or_default();
    assert!(form.contains(format), "{form} is not {format}");
}

#[test]
fn qemus_other_dumps() {
    must_agree(&[reference().paged.clone()], "ELF vmcore");
    must_agree(&[reference().zlib.clone()], "kdump-compressed, version 6, dump level 1, by QEMU");
}

/// Without registers, who crashed is told by the kernel's own words in memory alone.
#[test]
fn bare_memory() {
    let made = reference();
    let said = diagnosed(std::slice::from_ref(&made.ram), &made.knowledge).1;
    assert_eq!(said.pointer("/input/format"), Some(&json!("raw image of RAM")));
    for fact in ["/kernel", "/state/tasks", "/state/log", "/state/modules"] {
        assert_eq!(said.pointer(fact), made.said.pointer(fact), "{fact}");
    }
    let titles = |said: &Value| said.pointer("/reports/0/title").cloned();
    assert!(titles(&said).is_some() && titles(&said) == titles(&made.said));
}

/// What makedumpfile takes for a dump: program headers at once behind the file header (QEMU has its section headers
/// there), and a note with VMCOREINFO, which this guest gave QEMU none of.
fn kdump_like() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let file = reference().folder.join("kdump-like");
        let source = fs::read(&reference().elf).unwrap();
        moved(&source, &vmcoreinfo(&source), &mut BufWriter::new(File::create(&file).unwrap()));
        file
    })
}

fn word(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// The text that the kernel keeps for its own crash dump.
fn vmcoreinfo(memory: &[u8]) -> Vec<u8> {
    let finder = memchr::memmem::Finder::new("\nBUILD-ID=");
    let holds = |at: usize| memory[..at].ends_with(b"-amd64") && memory[at..].len() > 4096;
    let middle = finder.find_iter(memory).find(|&at| holds(at)).expect("VMCOREINFO in memory");
    let start = memory[..middle].windows(10).rposition(|window| window == b"OSRELEASE=").unwrap();
    let end = memory[start..].iter().position(|byte| *byte == 0).unwrap();
    memory[start..start + end].to_vec()
}

fn note(name: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in [name.len() as u32 + 1, content.len() as u32, kind] {
        bytes.extend(number.to_le_bytes());
    }
    for part in [&[name, &[0]].concat(), content] {
        bytes.extend(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Writes the ELF file `source` with its headers first, and a VMCOREINFO note more.
fn moved(source: &[u8], info: &[u8], out: &mut impl Write) {
    let (table, count) = (word(source, 32), u16::from_le_bytes([source[56], source[57]]));
    let headers: Vec<&[u8]> =
        (0..usize::from(count)).map(|index| &source[table + index * PHDR..][..PHDR]).collect();
    let note_header = headers.iter().find(|header| header[0] == 4).unwrap();
    let old_notes = &source[word(note_header, 8)..][..word(note_header, 32)];
    let notes = [old_notes, &note(b"VMCOREINFO", 0, info)].concat();
    let mut at = (EHDR + headers.len() * PHDR + notes.len()).next_multiple_of(4096);
    let mut head = source[..EHDR].to_vec();
    for (field, value) in [(32, EHDR), (40, 0)] {
        head[field..field + 8].copy_from_slice(&value.to_le_bytes());
    }
    head[52..54].copy_from_slice(&(EHDR as u16).to_le_bytes());
    head[58..64].fill(0);
    let mut pieces = Vec::new();
    for header in &headers {
        let mut header = header.to_vec();
        if header[0] == 4 {
            header[8..16].copy_from_slice(&(EHDR + headers.len() * PHDR).to_le_bytes());
            header[32..40].copy_from_slice(&notes.len().to_le_bytes());
            header[40..48].copy_from_slice(&notes.len().to_le_bytes());
        } else {
            pieces.push(&source[word(&header, 8)..][..word(&header, 32)]);
            header[8..16].copy_from_slice(&at.to_le_bytes());
            at += word(&header, 32);
        }
        head.extend(header);
    }
    head.extend(notes);
    head.resize(head.len().next_multiple_of(4096), 0);
    out.write_all(&head).unwrap();
    pieces.iter().for_each(|piece| out.write_all(piece).unwrap());
    out.flush().unwrap();
}

/// Has makedumpfile make files, and compares what they tell.
fn makedumpfile_must_agree(name: &str, flags: &[&str], parts: usize, format: &str) {
    let folder = &reference().folder;
    let files: Vec<PathBuf> =
        (0..parts).map(|part| folder.join(format!("{name}.{part}"))).collect();
    let mut command = Command::new("makedumpfile");
    command.args(flags).arg(kdump_like());
    let flattened = flags.contains(&"-F");
    if flattened {
        command.stdout(File::create(&files[0]).unwrap());
    } else {
        command.args(&files);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    must_agree(&files, format);
    let backwards: Vec<PathBuf> = files.iter().rev().cloned().collect();
    must_agree(&backwards, format);
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
}

#[test]
fn an_elf_dump_as_kdump_writes_it() {
    must_agree(&[kdump_like().to_owned()], "ELF vmcore");
}

#[test]
fn makedumpfiles_compressions_and_levels() {
    makedumpfile_must_agree("zlib", &["-c", "-d", "31"], 1, "dump level 31");
    makedumpfile_must_agree("lzo", &["-l", "-d", "1"], 1, "dump level 1");
    makedumpfile_must_agree("all", &["-l", "-d", "0"], 1, "dump level 0");
    makedumpfile_must_agree("plain", &["-d", "17"], 1, "dump level 17");
}

#[test]
fn makedumpfiles_other_forms() {
    makedumpfile_must_agree("elf", &["-E", "-d", "31"], 1, "ELF vmcore");
    makedumpfile_must_agree("flat", &["-F", "-c", "-d", "31"], 1, "flattened");
    makedumpfile_must_agree("flat-elf", &["-F", "-E", "-d", "31"], 1, "flattened");
    makedumpfile_must_agree("split", &["--split", "-c", "-d", "31"], 2, "in 2 parts");
}

/// With five levels of page tables (`-cpu max` has LA57), the kernel's half begins at 0xff00000000000000.
#[test]
fn a_guest_with_five_levels_of_page_tables() {
    let config = VmConfig { cpu: Some("max".to_owned()), ..lab("6.1") };
    let mut crashed = Crashed::of("formats/five-levels", &config, "crash_locks", crashed::PAIR);
    let dump = crashed.dumped("vmcore", &json!({}));
    let said = told(&[dump], &crashed.knowledge);
    assert_eq!(
        said.pointer("/diagnosis/offender"),
        reference().said.pointer("/diagnosis/offender")
    );
    let task = said.pointer("/diagnosis/task/at").and_then(Value::as_str).unwrap_or_default();
    assert!(task.starts_with("0xff") && !task.starts_with("0xffff"), "{task}");
    let holder = "/state/waiting/known/locks/0/owner/comm";
    assert_eq!(said.pointer(holder), reference().said.pointer(holder));
}

/// Nothing panicked: a CPU goes round in a driver with interrupts off.
#[test]
fn a_guest_that_hangs() {
    let deed = "crash crash_hang write loop-irqs-off 3000";
    let mut crashed = Crashed::of("formats/hung", &lab("6.1"), "crash_hang", deed);
    let dump = crashed.dumped("vmcore", &json!({}));
    let (code, said) = diagnosed(&[dump], &crashed.knowledge);
    assert_eq!((code, said.get("diagnosis")), (1, Some(&Value::Null)));
    let busy =
        said.pointer("/state/cpus").and_then(Value::as_array).into_iter().flatten().any(|cpu| {
            let frames = cpu.pointer("/backtrace/known/frames").and_then(Value::as_array);
            frames
                .into_iter()
                .flatten()
                .any(|frame| frame.get("module") == Some(&json!("crash_hang")))
        });
    assert!(busy, "{}", said.pointer("/state/cpus").unwrap_or(&Value::Null));
}
