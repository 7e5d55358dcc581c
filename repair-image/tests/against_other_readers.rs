//! A compiled kernel layer against other readers of the same vmlinux: lines against llvm-symbolizer, unwind rows against
//! gimli's own evaluation. Needs `DEFIB_VMLINUX` (a kernel with debug information): ignored without.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use defib_repair_image::{CfaRule, KernelLayer, RowSource, SavedRule, base_name, compile};
use gimli::{DebugFrame, LittleEndian, RegisterRule, UnwindSection, X86_64};
use guest::LinkAddr;
use object::{Object, ObjectSection};

fn vmlinux() -> PathBuf {
    PathBuf::from(std::env::var_os("DEFIB_VMLINUX").expect("DEFIB_VMLINUX is set"))
}

fn layer() -> &'static KernelLayer {
    static LAYER: OnceLock<KernelLayer> = OnceLock::new();
    LAYER.get_or_init(|| compile::vmlinux(&vmlinux(), 2).expect("vmlinux compiles"))
}

fn addresses(count: usize) -> Vec<LinkAddr> {
    let symbol = |name| layer().knowledge().symbol(name).expect("text symbol").at.0;
    let (start, end) = (symbol("_stext"), symbol("_etext"));
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        LinkAddr(start + state % (end - start))
    };
    (0..count).map(|_| next()).collect()
}

/// The path without `.` and `..`.
fn plain(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Function, file and line of each frame, innermost first, as llvm-symbolizer tells them.
fn llvm(vmlinux: &Path, addresses: &[LinkAddr]) -> Vec<Vec<(String, String, u32)>> {
    let mut child = Command::new("llvm-symbolizer")
        .args(["--inlines", "--no-demangle", "--output-style=LLVM", "-e"])
        .arg(vmlinux)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("llvm-symbolizer runs");
    let text: String = addresses.iter().map(|at| format!("{at:#x}\n")).collect();
    let mut input = child.stdin.take().expect("piped");
    let writer = std::thread::spawn(move || input.write_all(text.as_bytes()));
    let output = child.wait_with_output().expect("output");
    writer.join().expect("writer").expect("written");
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    let blocks = output.trim_end().split("\n\n");
    let frames = |block: &str| {
        let lines: Vec<&str> = block.lines().collect();
        let one = |pair: &[&str]| {
            let (place, _) = pair[1].rsplit_once(':').expect("column");
            let (file, line) = place.rsplit_once(':').expect("line");
            (pair[0].to_owned(), plain(file), line.parse().unwrap_or(0))
        };
        lines.chunks_exact(2).map(one).collect()
    };
    blocks.map(frames).collect()
}

#[test]
#[ignore = "needs DEFIB_VMLINUX and llvm-symbolizer"]
fn lines_agree_with_llvm() {
    let addresses = addresses(5000);
    let theirs = llvm(&vmlinux(), &addresses);
    assert_eq!(theirs.len(), addresses.len());
    let (mut compared, mut frames, mut wrong, mut names) = (0, 0, 0, 0);
    for (at, theirs) in addresses.iter().zip(&theirs) {
        let ours = layer().knowledge().source(*at);
        let known = theirs.first().is_some_and(|frame| frame.1 != "??");
        if !known && ours.is_empty() {
            continue;
        }
        compared += 1;
        frames += theirs.len();
        let same = ours.len() == theirs.len()
            && ours
                .iter()
                .zip(theirs)
                .all(|(own, other)| other.1.ends_with(&own.file) && own.line == other.2);
        if !same {
            wrong += 1;
            if wrong <= 10 {
                println!("{at}\n  ours {ours:?}\n  llvm {theirs:?}");
            }
            continue;
        }
        let name = |own: &Option<String>, other: &str| own.as_deref() == Some(base_name(other));
        names +=
            usize::from(!ours.iter().zip(theirs).all(|(own, other)| name(&own.function, &other.0)));
    }
    println!("{compared} compared, {frames} frames, {wrong} differ, {names} in a name only");
    assert!(compared > addresses.len() / 2);
    assert!(wrong * 500 <= compared, "{wrong} of {compared} differ");
}

fn rule(rule: Option<RegisterRule<usize>>) -> Option<SavedRule> {
    match rule {
        None | Some(RegisterRule::SameValue) => Some(SavedRule::Same),
        Some(RegisterRule::Offset(offset)) => Some(SavedRule::AtCfa(offset as i32)),
        _ => None,
    }
}

#[test]
#[ignore = "needs DEFIB_VMLINUX"]
fn rows_agree_with_gimli() {
    let bytes = std::fs::read(vmlinux()).expect("vmlinux");
    let elf = object::File::parse(&*bytes).expect("ELF");
    let section = elf.section_by_name(".debug_frame").expect(".debug_frame").data().expect("data");
    let frames = DebugFrame::new(section, LittleEndian);
    let bases = gimli::BaseAddresses::default();
    let mut fdes = Vec::new();
    let mut entries = frames.entries(&bases);
    while let Some(entry) = entries.next().expect("entry") {
        if let gimli::CieOrFde::Fde(partial) = entry {
            fdes.push(partial.parse(DebugFrame::cie_from_offset).expect("FDE"));
        }
    }
    fdes.sort_by_key(gimli::FrameDescriptionEntry::initial_address);
    let mut context = gimli::UnwindContext::new();
    let (mut compared, mut orc, mut none, mut wrong) = (0, 0, 0, 0);
    let mut expressions = 0;
    for at in addresses(20_000) {
        let index = fdes.partition_point(|fde| fde.initial_address() <= at.0);
        let Some(fde) = index.checked_sub(1).map(|index| &fdes[index]) else { continue };
        if !fde.contains(at.0) {
            continue;
        }
        let theirs = fde.unwind_info_for_address(&frames, &bases, &mut context, at.0).expect("row");
        let Some(ours) = layer().knowledge().unwind_row(at) else {
            none += 1;
            continue;
        };
        if ours.source != RowSource::Cfi {
            // A function that aligns its stack has an expression as its CFA: ORC's rule stands alone.
            let expression = matches!(theirs.cfa(), gimli::CfaRule::Expression(_));
            expressions += usize::from(expression);
            orc += usize::from(!expression);
            if !expression && orc <= 20 {
                println!("{at} ours {ours:?} gimli {:?}", theirs.cfa());
            }
            continue;
        }
        compared += 1;
        let cfa = match (theirs.cfa(), ours.cfa) {
            (
                gimli::CfaRule::RegisterAndOffset { register, offset },
                CfaRule::Offset { reg, offset: own },
            ) => *offset == i64::from(own) && X86_64::register_name(*register) == Some(reg.name()),
            _ => false,
        };
        let registers =
            [X86_64::RBX, X86_64::RBP, X86_64::R12, X86_64::R13, X86_64::R14, X86_64::R15];
        let saved = registers.iter().zip(ours.saved).all(|(register, own)| {
            rule(theirs.register(*register)).is_none_or(|other| other == own)
        });
        if !cfa || !saved {
            wrong += 1;
            println!("{at} ours {ours:?} gimli {theirs:?}");
        }
    }
    println!(
        "{compared} rows compared, {wrong} differ, {orc} by ORC only, {none} without a row, {expressions} expressions"
    );
    assert!(compared > 8000 && wrong == 0);
    assert!((orc + none) * 100 < 2 * compared);
}
