// Package e2e tests Tenon from outside: a real daemon on the real kernel, driven
// by the stock docker CLI. It starts daemons of its own (own roots, own name
// prefix, own address pools), so that any number of them and a daemon in use
// live side by side on one machine.
//
// The behaviours that must hold in every isolation mode are a table
// (behaviours_*_test.go): a shell script over `docker`, and what it must print.
// The same table is run once per mode, and docs/conformance.md says what each does.
package e2e
