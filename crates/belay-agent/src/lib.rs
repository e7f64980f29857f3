//! The agent: owns devices, carries out decisions, serves the API, keeps the ledger
