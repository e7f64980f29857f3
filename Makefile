# The project's commands. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help build test

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

build: ## build the release binary, target/release/belay
	cargo build --release --locked -p belay

test: ## run all tests (as root: all of them; otherwise what needs root is skipped, by name)
	cargo test --workspace --locked
