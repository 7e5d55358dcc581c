//! What the kernel says of a crash: the text of `panic()`, file and line of a `BUG()`. Read from
//! registers and tables, not from the log.

use guest::{GuestVirt, Reg, Registers};
use repair_image::base_name;

use crate::kernel::{Kernel, printable};

/// Longest format string and longest message, bytes: panic() has a buffer of 1024.
const FORMAT_MAX: usize = 1024;
/// Longest string argument that is shown, bytes.
const STRING_MAX: usize = 256;
/// Widest field that is padded, columns.
const WIDTH_MAX: usize = 64;
/// Entries of one bug table that are looked at: v6.12 has 10,000.
const BUGS_MAX: u64 = 1 << 17;
/// Entries read at a time.
const BUGS_CHUNK: u64 = 1024;
/// Longest path of a source file, bytes (PATH_MAX).
const PATH_MAX: usize = 4096;
/// Flag of a `bug_entry`: WARN(), not BUG(), include/asm-generic/bug.h.
const BUGFLAG_WARNING: u64 = 1;

/// An entry of a bug table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bug {
    /// Source file, without `CONFIG_DEBUG_BUGVERBOSE` not recorded.
    pub(crate) file: Option<String>,
    pub(crate) line: u64,
    /// Whether it is a WARN().
    pub(crate) warning: bool,
}

impl Bug {
    /// As the kernel prints it.
    pub(crate) fn text(&self) -> String {
        match &self.file {
            Some(file) => format!("kernel BUG at {file}:{}!", self.line),
            None => "kernel BUG".to_owned(),
        }
    }
}

/// The bug-table entry of the instruction at `ip`, in the table of its module or the kernel's.
pub(crate) fn bug_at(kernel: &Kernel<'_>, ip: GuestVirt) -> Option<Bug> {
    let (start, count) = match kernel.image.module_of_text(ip) {
        Some(module) => (
            kernel.pointer(module.at, "module", "bug_table").ok()?,
            kernel.number(module.at, "module", "num_bugs").ok()?,
        ),
        None => {
            let start = kernel.image.address_of("__start___bug_table")?;
            let stop = kernel.image.address_of("__stop___bug_table")?;
            let size = kernel.image.types.size_of("bug_entry").filter(|&size| size > 0)?;
            (start, stop.0.checked_sub(start.0)? / size)
        }
    };
    find_bug(kernel, start, count.min(BUGS_MAX), ip)
}

fn find_bug(kernel: &Kernel<'_>, start: GuestVirt, count: u64, ip: GuestVirt) -> Option<Bug> {
    let size = kernel.image.types.size_of("bug_entry").filter(|size| (4..=64).contains(size))?;
    // CONFIG_GENERIC_BUG_RELATIVE_POINTERS, set on x86-64.
    let relative = kernel.offset("bug_entry", "bug_addr_disp").ok();
    let absolute = kernel.offset("bug_entry", "bug_addr").ok();
    let mut first = 0;
    while first < count {
        let entries = (count - first).min(BUGS_CHUNK);
        let mut bytes = vec![0; (entries * size) as usize];
        let at = start + first * size;
        kernel.memory.read(at, &mut bytes).ok()?;
        for (index, entry) in bytes.chunks_exact(size as usize).enumerate() {
            let entry_at = at + index as u64 * size;
            let address = match (relative, absolute) {
                (Some(offset), _) => {
                    (entry_at + offset).offset(i64::from(i32::from_le_bytes(word(entry, offset)?)))
                }
                (None, Some(offset)) => GuestVirt(u64::from_le_bytes(word(entry, offset)?)),
                (None, None) => return None,
            };
            if address == ip {
                return Some(read_bug(kernel, entry_at));
            }
        }
        first += entries;
    }
    None
}

fn word<const N: usize>(bytes: &[u8], offset: u64) -> Option<[u8; N]> {
    let offset = usize::try_from(offset).ok()?;
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

fn read_bug(kernel: &Kernel<'_>, at: GuestVirt) -> Bug {
    let relative = kernel.offset("bug_entry", "file_disp").ok().and_then(|offset| {
        let displacement = kernel.int(at, "bug_entry", "file_disp").ok()?;
        Some((at + offset).offset(i64::from(displacement)))
    });
    let file = relative.or_else(|| kernel.pointer(at, "bug_entry", "file").ok());
    let flags = kernel.number(at, "bug_entry", "flags").unwrap_or(0);
    Bug {
        file: file.and_then(|file| kernel.string(file, PATH_MAX).ok()),
        line: kernel.number(at, "bug_entry", "line").unwrap_or(0),
        warning: flags & BUGFLAG_WARNING != 0,
    }
}

/// The text of a `panic(fmt, ...)` that stands at its entry with these registers.
pub(crate) fn panic_text(kernel: &Kernel<'_>, registers: &Registers) -> Option<String> {
    let format = GuestVirt(registers.get(Reg::Rdi)?);
    let format = kernel.memory.read_cstr(format, FORMAT_MAX).ok()?;
    let mut arguments = Arguments { kernel, registers, next: 1 };
    let text = render(&format, &mut arguments);
    Some(printable(text.trim_end().as_bytes()))
}

/// Variable arguments at the entry of a function whose first argument is the format: five in registers,
/// the rest above the return address (System V ABI, AMD64 supplement 3.2.3).
struct Arguments<'a> {
    kernel: &'a Kernel<'a>,
    registers: &'a Registers,
    next: usize,
}

impl Arguments<'_> {
    fn take(&mut self) -> Option<u64> {
        let index = self.next;
        self.next = self.next.checked_add(1)?;
        match Reg::ARGUMENTS.get(index) {
            Some(&reg) => self.registers.get(reg),
            None => {
                let slot = (index - Reg::ARGUMENTS.len()) as u64;
                let at = self.registers.rsp()?.checked_add(8)?.checked_add(slot * 8)?;
                self.kernel.memory.read_u64(at).ok()
            }
        }
    }
}

/// One conversion of a format string.
#[derive(Debug, Default)]
struct Conversion {
    left: bool,
    zero: bool,
    alternate: bool,
    width: usize,
    precision: Option<usize>,
    /// Size of the argument in bytes.
    size: u32,
    kind: char,
}

/// Kernel format strings (Documentation/core-api/printk-formats.rst), as far as panics use them. An
/// argument that can't be had shows as `?`.
fn render(format: &str, arguments: &mut Arguments<'_>) -> String {
    let mut out = String::new();
    let mut rest = format.chars().peekable();
    while let Some(c) = rest.next() {
        if out.len() >= FORMAT_MAX {
            break;
        }
        if c != '%' {
            out.push(c);
            continue;
        }
        let Some(conversion) = conversion(&mut rest, arguments) else { break };
        if conversion.kind == '%' {
            out.push('%');
            continue;
        }
        let text = value(&conversion, &mut rest, arguments).unwrap_or_else(|| "?".to_owned());
        pad(&mut out, &text, &conversion);
    }
    out.chars().take(FORMAT_MAX).collect()
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn conversion(rest: &mut Chars<'_>, arguments: &mut Arguments<'_>) -> Option<Conversion> {
    let mut found = Conversion { size: 4, ..Conversion::default() };
    while let Some(flag) = rest.next_if(|c| "-+ #0".contains(*c)) {
        match flag {
            '-' => found.left = true,
            '0' => found.zero = true,
            '#' => found.alternate = true,
            _ => {}
        }
    }
    found.width = number(rest, arguments).unwrap_or(0).min(WIDTH_MAX);
    if rest.next_if_eq(&'.').is_some() {
        found.precision = Some(number(rest, arguments).unwrap_or(0));
    }
    while let Some(modifier) = rest.next_if(|c| "hlLzjt".contains(*c)) {
        found.size = match modifier {
            'h' => found.size / 2,
            _ => 8,
        };
    }
    found.kind = rest.next()?;
    Some(found)
}

fn number(rest: &mut Chars<'_>, arguments: &mut Arguments<'_>) -> Option<usize> {
    if rest.next_if_eq(&'*').is_some() {
        return usize::try_from(arguments.take()? as u32).ok();
    }
    let mut found = None;
    while let Some(digit) = rest.peek().and_then(|c| c.to_digit(10)) {
        rest.next();
        found = Some(found.unwrap_or(0usize).saturating_mul(10).saturating_add(digit as usize));
    }
    found
}

fn value(
    conversion: &Conversion,
    rest: &mut Chars<'_>,
    arguments: &mut Arguments<'_>,
) -> Option<String> {
    let raw = arguments.take();
    if conversion.kind == 'p' {
        return pointer(rest, arguments.kernel, raw?);
    }
    let raw = raw?;
    let kept = 64_u32.saturating_sub(conversion.size.saturating_mul(8)).min(63);
    let unsigned = raw << kept >> kept;
    let signed = (raw << kept) as i64 >> kept;
    Some(match conversion.kind {
        'd' | 'i' => signed.to_string(),
        'u' => unsigned.to_string(),
        'x' if conversion.alternate => format!("{unsigned:#x}"),
        'x' => format!("{unsigned:x}"),
        'X' => format!("{unsigned:X}"),
        'o' => format!("{unsigned:o}"),
        'c' => char::from(raw as u8).to_string(),
        's' => string(arguments.kernel, raw, conversion.precision)?,
        _ => return None,
    })
}

fn string(kernel: &Kernel<'_>, raw: u64, precision: Option<usize>) -> Option<String> {
    // vsprintf() prints these for pointers in the first page, lib/vsprintf.c check_pointer_msg().
    if raw == 0 {
        return Some("(null)".to_owned());
    }
    let text = kernel.memory.read_cstr(GuestVirt(raw), STRING_MAX).ok()?;
    Some(text.chars().take(precision.unwrap_or(STRING_MAX)).collect())
}

/// `%p` and its extensions: symbols are resolved, anything else shows as the value. (The kernel would
/// hash `%p`; the value is of more use here.)
fn pointer(rest: &mut Chars<'_>, kernel: &Kernel<'_>, raw: u64) -> Option<String> {
    let extension: String =
        std::iter::from_fn(|| rest.next_if(char::is_ascii_alphanumeric)).collect();
    let at = GuestVirt(raw);
    Some(match extension.chars().next() {
        Some('S' | 's' | 'B') => {
            let lookup = if extension.starts_with('B') { at.offset(-1) } else { at };
            match kernel.image.locate(lookup) {
                Some(found) => {
                    let offset = at - found.start(lookup);
                    format!("{}+{offset:#x}/{:#x}", base_name(found.symbol.name), found.symbol.size)
                }
                None => format!("{raw:#x}"),
            }
        }
        _ => format!("{raw:016x}"),
    })
}

fn pad(out: &mut String, text: &str, conversion: &Conversion) {
    let missing = conversion.width.saturating_sub(text.chars().count());
    let fill = if conversion.zero && !conversion.left { '0' } else { ' ' };
    if !conversion.left {
        out.extend(std::iter::repeat_n(fill, missing));
    }
    out.push_str(text);
    if conversion.left {
        out.extend(std::iter::repeat_n(' ', missing));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Guest, MODULE, TEXT};

    fn said(format: &str, change: impl FnOnce(Registers) -> Registers) -> Option<String> {
        let mut guest = Guest::new().function("culprit", TEXT + 0x100, 0x40);
        guest.poke(DATA, format.as_bytes());
        guest.poke(DATA + 0x800, b"dm-0\x1b");
        guest.poke_u64(DATA + 0x908, 66);
        let image = guest.image();
        let space = guest.machine.space();
        let registers = Registers::unknown().with(Reg::Rdi, DATA).with(Reg::Rsp, DATA + 0x900);
        panic_text(&Kernel::of_memory(&image, &space), &change(registers))
    }

    #[test]
    fn formats_as_the_kernel_does() {
        let text = said("exit %d of %-4s|%5u|%#x at %pS%%\n", |regs| {
            regs.with(Reg::Rsi, 0xffff_fffe)
                .with(Reg::Rdx, 0)
                .with(Reg::Rcx, 42)
                .with(Reg::R8, 0x1f)
                .with(Reg::R9, TEXT + 0x110)
        });
        assert_eq!(text.as_deref(), Some("exit -2 of (null)|   42|0x1f at culprit+0x10/0x40%"));
    }

    #[test]
    fn arguments_beyond_the_registers_are_on_the_stack() {
        let text = said("%u%u%u%u%u %lu", |regs| {
            [Reg::Rsi, Reg::Rdx, Reg::Rcx, Reg::R8, Reg::R9]
                .into_iter()
                .fold(regs, |regs, reg| regs.with(reg, 1))
        });
        assert_eq!(text.as_deref(), Some("11111 66"));
    }

    #[test]
    fn what_cannot_be_read_shows_as_a_question_mark() {
        assert_eq!(said("%s and %d", |regs| regs.with(Reg::Rsi, 8)).as_deref(), Some("? and ?"));
        let text = said("VFS: cannot mount %s", |regs| regs.with(Reg::Rsi, DATA + 0x800));
        assert_eq!(text.as_deref(), Some("VFS: cannot mount dm-0."));
        assert_eq!(said("cut %", |regs| regs).as_deref(), Some("cut"));
        assert_eq!(said("%999999999999999999999d", |regs| regs).map(|text| text.len()), Some(64));
    }

    #[test]
    fn bug_tables_of_the_kernel_and_of_modules() {
        let mut guest = Guest::new()
            .object("__start___bug_table", DATA + 0x100)
            .object("__stop___bug_table", DATA + 0x100 + 24)
            .types(|types| {
                types.with("module", "bug_table", 0, 8).with("module", "num_bugs", 8, 4)
            });
        for (at, ip, file) in [
            (DATA + 0x100, TEXT + 0x10, DATA + 0x200),
            (DATA + 0x10c, TEXT + 0x20, DATA + 0x200),
            (DATA + 0x300, MODULE + 0x30, DATA + 0x220),
        ] {
            guest.poke_u32(at, (ip as u32).wrapping_sub(at as u32));
            guest.poke_u32(at + 4, (file as u32).wrapping_sub(at as u32 + 4));
            guest.poke_u32(at + 8, 77);
        }
        guest.poke(DATA + 0x200, b"mm/slub.c\0");
        guest.poke(DATA + 0x220, b"m.c\0");
        guest.poke_u64(MODULE + 0xe00, DATA + 0x300);
        guest.poke_u32(MODULE + 0xe08, u32::MAX);
        let image = guest.image();
        let space = guest.machine.space();
        let kernel = Kernel::of_memory(&image, &space);
        let text = |ip| bug_at(&kernel, GuestVirt(ip)).map(|bug| bug.text());
        assert_eq!(text(TEXT + 0x20).as_deref(), Some("kernel BUG at mm/slub.c:77!"));
        assert_eq!(text(MODULE + 0x30).as_deref(), Some("kernel BUG at m.c:77!"));
        assert_eq!(text(TEXT + 0x21), None);
        assert_eq!(text(MODULE + 0x31), None);
    }
}
