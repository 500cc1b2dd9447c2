"""Adapters: small modules added to a frozen policy. CLARE's layers and their PEFT configuration."""
