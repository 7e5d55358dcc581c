//! Where knowledge of kernels comes from, as named by arguments and environment. Getting it is crate
//! `guard`'s.

use guard::KnowledgeSources;

use crate::cli;

/// The sources that the arguments name, with the user's cache directory if they name none.
#[must_use]
pub fn sources(arguments: &cli::KnowledgeSources) -> KnowledgeSources {
    let cli::KnowledgeSources { vmlinux, debug_dirs, cache } = arguments.clone();
    let cache = Some(cache.unwrap_or_else(KnowledgeSources::default_cache));
    KnowledgeSources { vmlinux, debug_dirs, cache }
}
