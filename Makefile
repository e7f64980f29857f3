# The project's commands. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help setup build guest demo test bench bench-evacuate man clean-guest

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## install what is missing (QEMU, busybox …) from the distribution's packages
	scripts/setup

build: ## build the release binary, target/release/belay
	cargo build --release --locked -p belay

guest: setup ## make the Linux guest of the demonstration, .cache/guest
	scripts/guest-image

demo: guest ## two hosts, a real guest under I/O, live-migrated there and back; report in target/demo
	cargo build --release --locked -p belay -p belay-demo
	target/release/belay-demo target/release/belay target/guest/x86_64-unknown-linux-gnu/release/belay-probe .cache/guest target/demo

test: setup ## run all tests (as root: all of them; otherwise what needs root is skipped, by name)
	scripts/guest-image || echo "test: there is no Linux guest here: tests that need one are skipped, by name"
	cargo test --workspace --locked

bench: setup ## the data paths' speed against qemu-storage-daemon and qemu-nbd; report in target/bench; ARGS=--quick
	scripts/fetch-qemu10 || echo "bench: the installed QEMU's programs are the peers"
	cargo build --release --locked -p belay -p belay-bench
	target/release/belay-bench $(ARGS)

bench-evacuate: guest ## how long until a VM and its disk have left a host: against QEMU's mirror; ROUNDS=1
	cargo build --release --locked -p belay -p belay-demo
	target/release/belay-demo evacuate $(or $(ROUNDS),1) target/release/belay target/guest/x86_64-unknown-linux-gnu/release/belay-probe .cache/guest target/bench

man: build ## man pages and shell completions, in target/man
	mkdir -p target/man
	target/release/belay man target/man
	target/release/belay completions bash > target/man/belay.bash
	target/release/belay completions zsh > target/man/_belay
	target/release/belay completions fish > target/man/belay.fish

clean-guest: ## forget the guest's kernel and initrd
	rm -rf .cache/guest
