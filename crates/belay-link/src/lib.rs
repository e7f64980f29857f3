//! Mutually authenticated connections between agents
