# Before systemd in the guest of test/cgroupv2/run: puts what scripts/install made, and
# the job, in place.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cp -a /job/usr/. /usr/
cp -a /job/etc/. /etc/
cp -a /job/lib/systemd/. /usr/lib/systemd/
mkdir -p /etc/systemd/system/multi-user.target.wants
mv /etc/job.service /etc/systemd/system/job.service
ln -sf ../job.service /etc/systemd/system/multi-user.target.wants/job.service
echo v2 >/etc/hostname
echo "127.0.0.1 localhost v2" >/etc/hosts
exec /sbin/init
