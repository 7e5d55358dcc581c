# Two commands do everything on a fresh Debian 12 machine (root): `make demo` and `make test`.
.PHONY: demo test bench lint setup clean

CARGO ?= cargo

demo: setup
	$(CARGO) build --release --quiet
	target/release/defib demo

# Unit, golden, property and end-to-end tests; the latter crash real guests.
test: setup lint
	$(CARGO) test --workspace --release

setup:
	scripts/setup

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --release --quiet -- -D warnings

bench: setup
	$(CARGO) build --release --quiet
	VMLINUX=$$(echo $${DEFIB_CACHE:-$$HOME/.cache/defib}/kernels/6.1.*-cloud-amd64/vmlinux) $(CARGO) bench --workspace --quiet

clean:
	$(CARGO) clean
