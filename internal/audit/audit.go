// Package audit finds what is wrong with images and containers.
package audit
