//! vhost-user back-end protocol server: VMM messages to started and stopped queues
