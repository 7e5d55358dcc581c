//! A minimal VMM, to be copied.
