//! Running the programs of the build (compiler, make, mkfs, fsck) to their end, with what they print
//! kept for the error.

use std::path::Path;
use std::process::Command;
use std::process::Stdio;

use super::kernel::Kernel;
use crate::Error;
use crate::Result;

/// How much of a failed program's output an error carries, in bytes.
const OUTPUT_KEPT: usize = 4000;

/// Runs a program; its output if it succeeded.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Start { program: program.clone(), source })?;
    let mut output = String::from_utf8_lossy(&done.stdout).into_owned();
    output.push_str(&String::from_utf8_lossy(&done.stderr));
    if done.status.success() {
        return Ok(output);
    }
    let output = tail(&output, OUTPUT_KEPT).to_owned();
    Err(Error::Program { program, status: done.status, output })
}

/// Builds the kernel modules of a folder, which has their Makefile, against a kernel's headers.
pub(crate) fn modules(kernel: &Kernel, dir: &Path) -> Result<()> {
    let folder = format!("M={}", dir.display());
    run(Command::new("make").arg("-C").arg(kernel.headers()).args([&folder, "modules"])).map(drop)
}

/// The last bytes of a text, cut at a character.
pub(crate) fn tail(text: &str, bytes: usize) -> &str {
    let mut from = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_carries_output_and_status() {
        let error = run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]));
        match error {
            Err(Error::Program { status, output, .. }) => {
                assert_eq!(status.code(), Some(3));
                assert_eq!(output, "out\nerr\n");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn tail_keeps_characters_whole() {
        assert_eq!(tail("aéz", 2), "z");
        assert_eq!(tail("aéz", 9), "aéz");
    }
}
