//! Addresses to function, file and line with inlined calls, by a compiled kernel layer and by other libraries on the same
//! vmlinux in the same run; `VMLINUX=file cargo bench -p defib-repair-image --bench lookup`.
//! Prints figures, ratios and in how many chains of file and line the others differ. Not a test: a reader judges them.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{CodeInfo, Input, Symbolizer};
use defib_repair_image::{KernelLayer, Knowledge, compile};
use guest::LinkAddr;

/// Addresses that are looked up.
const COUNT: usize = 1_000_000;
/// File name and line of each level, innermost first; empty where no line is known.
type Chain = Vec<(String, u32)>;

/// Looks all of them up.
trait Lookup {
    /// As fast as it can; the sum of all lengths and lines, for nothing to be left out.
    fn sum(&self, addresses: &[u64]) -> u64;

    /// What was found.
    fn chains(&self, addresses: &[u64]) -> Vec<Chain>;
}

fn weigh(function: Option<&str>, file: &str, line: u32) -> u64 {
    (function.map_or(0, str::len) + file.len()) as u64 + u64::from(line)
}

/// The last component: libraries shorten paths differently.
fn file_name(path: &str) -> String {
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

struct Ours<'a>(&'a Knowledge);

impl Lookup for Ours<'_> {
    fn sum(&self, addresses: &[u64]) -> u64 {
        let frames = addresses.iter().flat_map(|&at| self.0.source_refs(LinkAddr(at)));
        frames.map(|frame| weigh(frame.function, frame.file, frame.line)).sum()
    }

    fn chains(&self, addresses: &[u64]) -> Vec<Chain> {
        let chain = |&at: &u64| {
            let frames = self.0.source(LinkAddr(at)).into_iter();
            frames.map(|frame| (file_name(&frame.file), frame.line)).collect()
        };
        addresses.iter().map(chain).collect()
    }
}

struct Gimli(addr2line::Loader);

impl Lookup for Gimli {
    fn sum(&self, addresses: &[u64]) -> u64 {
        let mut sum = 0;
        for &at in addresses {
            let Ok(mut frames) = self.0.find_frames(at) else { continue };
            while let Ok(Some(frame)) = frames.next() {
                let name = frame.function.as_ref().and_then(|function| function.raw_name().ok());
                let Some(place) = frame.location else { continue };
                let (file, line) = (place.file.unwrap_or_default(), place.line.unwrap_or_default());
                sum += weigh(name.as_deref(), file, line);
            }
        }
        sum
    }

    fn chains(&self, addresses: &[u64]) -> Vec<Chain> {
        addresses.iter().map(|&at| self.chain(at).unwrap_or_default()).collect()
    }
}

impl Gimli {
    fn chain(&self, at: u64) -> Option<Chain> {
        let mut frames = self.0.find_frames(at).ok()?;
        let mut chain = Chain::new();
        while let Ok(Some(frame)) = frames.next() {
            let Some(place) = frame.location else { break };
            chain.push((file_name(place.file.unwrap_or_default()), place.line.unwrap_or_default()));
        }
        Some(chain)
    }
}

struct Blaze {
    symbolizer: Symbolizer,
    source: Source<'static>,
}

impl Lookup for Blaze {
    fn sum(&self, addresses: &[u64]) -> u64 {
        let found = self.symbolizer.symbolize(&self.source, Input::VirtOffset(addresses));
        let found = found.expect("blazesym answers");
        let of = |name: &str, info: Option<&CodeInfo<'_>>| {
            let place = info.map(|info| (info.file.len(), info.line.unwrap_or_default()));
            place.map_or(0, |(file, line)| (name.len() + file) as u64 + u64::from(line))
        };
        let all = found.iter().filter_map(|found| found.as_sym()).map(|symbol| {
            let inlined = symbol.inlined.iter().map(|call| of(&call.name, call.code_info.as_ref()));
            of(&symbol.name, symbol.code_info.as_deref()) + inlined.sum::<u64>()
        });
        all.sum()
    }

    fn chains(&self, addresses: &[u64]) -> Vec<Chain> {
        let found = self.symbolizer.symbolize(&self.source, Input::VirtOffset(addresses));
        let place = |info: &CodeInfo<'_>| {
            (info.file.to_string_lossy().into_owned(), info.line.unwrap_or_default())
        };
        let chain = |found: blazesym::symbolize::Symbolized<'_>| {
            let Some(symbol) = found.as_sym() else { return Chain::new() };
            let inlined = symbol.inlined.iter().rev().map(|call| call.code_info.as_ref());
            let all = inlined.chain([symbol.code_info.as_deref()]);
            all.flatten().map(place).map(|(file, line)| (file_name(&file), line)).collect()
        };
        found.expect("blazesym answers").into_iter().map(chain).collect()
    }
}

/// Addresses spread evenly over the kernel's text, in no order.
fn addresses(knowledge: &Knowledge) -> Vec<u64> {
    let symbol = |name| knowledge.symbol(name).map_or(0, |symbol| symbol.at.0);
    let (start, end) = (symbol("_stext"), symbol("_etext"));
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        start + state % (end - start).max(1)
    };
    (0..COUNT).map(|_| next()).collect()
}

/// One library's answers and times.
struct Run {
    name: &'static str,
    open: Duration,
    passes: [Duration; 2],
    chains: Vec<Chain>,
}

fn run<L: Lookup>(name: &'static str, addresses: &[u64], open: impl FnOnce() -> L) -> Run {
    let start = Instant::now();
    let lookup = open();
    let open = start.elapsed();
    let passes = [(); 2].map(|()| {
        let start = Instant::now();
        black_box(lookup.sum(addresses));
        start.elapsed()
    });
    Run { name, open, passes, chains: lookup.chains(addresses) }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn print(run: &Run, ours: &Run) {
    let rate = |run: &Run, pass: usize| run.chains.len() as f64 / run.passes[pass].as_secs_f64();
    let known = run.chains.iter().filter(|chain| !chain.is_empty()).count();
    let both = |chain: &Chain, own: &Chain| !chain.is_empty() && !own.is_empty();
    let pairs = || run.chains.iter().zip(&ours.chains);
    let differ = pairs().filter(|(chain, own)| both(chain, own) && chain != own).count();
    let missed = pairs().filter(|(chain, own)| !chain.is_empty() && own.is_empty()).count();
    println!(
        "{:<12} open {:>8.1} ms, first pass {:>9.0}/s, second {:>9.0}/s (defib: {:>6.1} and {:>5.1} times that); \
         {known} known, {differ} chains differ, {missed} only known here",
        run.name,
        run.open.as_secs_f64() * 1e3,
        rate(run, 0),
        rate(run, 1),
        rate(ours, 0) / rate(run, 0),
        rate(ours, 1) / rate(run, 1),
    );
}

fn main() {
    let Ok(vmlinux) = std::env::var("VMLINUX") else {
        println!("set VMLINUX to a kernel with debug information");
        return;
    };
    let vmlinux = Path::new(&vmlinux);
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("kernel.defib");
    compile::vmlinux(vmlinux, 2).expect("vmlinux compiles").write(&file).expect("layer is written");
    let layer = KernelLayer::open(&file).expect("layer opens");
    let addresses = addresses(layer.knowledge());
    println!("{COUNT} addresses, one thread");
    let ours = run("defib", &addresses, || Ours(layer.knowledge()));
    print(&ours, &ours);
    let gimli = run("addr2line", &addresses, || {
        Gimli(addr2line::Loader::new(vmlinux).expect("addr2line reads vmlinux"))
    });
    print(&gimli, &ours);
    let blaze = run("blazesym", &addresses, || Blaze {
        symbolizer: Symbolizer::new(),
        source: Source::Elf(Elf::new(vmlinux.to_owned())),
    });
    print(&blaze, &ours);
}
