//! Where knowledge of kernels comes from, as named by arguments and environment. Getting it is crate
//! `guard`'s.

use std::path::PathBuf;

use guard::KnowledgeSources;

use crate::cli;

/// The sources that the arguments name, with the user's cache directory if they name none.
#[must_use]
pub fn sources(arguments: &cli::KnowledgeSources) -> KnowledgeSources {
    let cli::KnowledgeSources { vmlinux, debug_dirs, cache } = arguments.clone();
    KnowledgeSources { vmlinux, debug_dirs, cache: Some(cache.unwrap_or_else(default_cache)) }
}

fn default_cache() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let of_user = variable("XDG_CACHE_HOME").map(|cache| cache.join("defib"));
    of_user
        .or_else(|| Some(variable("HOME")?.join(".cache/defib")))
        .unwrap_or_else(|| PathBuf::from("/var/cache/defib"))
}
